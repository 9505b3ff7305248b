#!/usr/bin/env bash
# Train recipes of the zoo one after the other within some minutes of a GPU.
#
#   scripts/gpu_minutes.sh MINUTES [NAME ...] [--out DIR] [--runs DIR] [--data-dir DIR] [--device D] [--dry-run] [-- OPTIONS OF train]
#
# Each recipe gets its share of the time (`patchcert train --max-minutes`, which scales its schedule). With NAMEs only these are
# trained, and their shares fill the time. Recipes whose share would be below half a minute are left out, the last ones first.
# A finished model is DIR/NAME.tar: weights, card, configuration, recipe, metrics and counts on held-out images. Above 15 MB it is
# several files of at most 15 MB (NAME.tar.00, NAME.tar.01, ...); `cat NAME.tar* | tar x`.
# The state is saved after each epoch: an epoch is at most one pass over the images, and at most a sixteenth of a share, so below
# a minute as long as no share is above 16 minutes. The same command resumes: finished models are skipped, a stopped one goes on.
# PATCHCERT is the command, by default .venv/bin/patchcert or patchcert: PATCHCERT="python3 -m patchcert_cli".
set -euo pipefail

# share of the time in percent, recipe, further options; from the first to the last
TABLE='
20 cifar-masked-cnn
14 cifar-strips-cnn
 4 mnist-masked-cnn
22 cifar-bagcert-rf7-large
16 cifar-smoothing-column-resnet18
10 cifar-ibp-p2-guided --stored float16
10 cifar-ibp-p5-modern --stored float16
 1 mnist-ibp-p2
 1 mnist-ibp-p5
 1 mnist-ibp-k4
 1 mnist-ibp-k10
'
START=0.2     # minutes of a share in which the process starts and the result is packed
LEAST=0.5     # minutes of a share, at least
MOST=15000000 # bytes of a file

usage() { echo "error[2]: $1" >&2; echo "hint: Type: scripts/gpu_minutes.sh 12 --dry-run" >&2; exit 2; }
known() { awk -v name="$1" '$2 == name { found = 1 } END { exit !found }' <<<"$TABLE"; }

minutes='' names='' out=gpu-minutes runs=runs/gpu-minutes device=auto dry=''
train=()
while [ $# -gt 0 ]; do
    case $1 in
    --out | --runs | --data-dir | --device)
        [ $# -gt 1 ] || usage "$1 needs a value."
        case $1 in
        --out) out=$2 ;;
        --runs) runs=$2 ;;
        --device) device=$2 ;;
        --data-dir) train+=(--data-dir "$2") ;;
        esac
        shift 2
        ;;
    --dry-run) dry=1 && shift ;;
    --) shift && train+=("$@") && break ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" && exit 0 ;;
    -[0-9]*) usage "'$1' is not a number of minutes." ;;
    -*) usage "there is no option $1." ;;
    *)
        if [ -z "$minutes" ]; then
            [[ $1 =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage "'$1' is not a number of minutes."
            [[ ${1%.*} =~ ^0*[0-9]{1,5}$ ]] || usage "'$1' minutes are more than 99,999."
            minutes=$1
        else
            known "$1" || usage "'$1' is not one of the recipes that this script trains."
            names="$names $1 "
        fi
        shift
        ;;
    esac
done
[ -n "$minutes" ] || usage "no minutes given."
if [ -z "${PATCHCERT:-}" ]; then
    PATCHCERT=patchcert
    [ ! -x .venv/bin/patchcert ] || PATCHCERT=.venv/bin/patchcert
fi

# lines of MINUTES NAME OPTIONS, for the recipes that are chosen and have enough time
plan=$(awk -v minutes="$minutes" -v names="$names" -v start="$START" -v least="$LEAST" '
    NF && (names == "" || index(names, " " $2 " ")) { share[++n] = $1; all += $1; $1 = ""; line[n] = $0 }
    function shortest(   i, found) { for (i = n; i; i--) if (!(i in out) && (!found || share[i] < share[found])) found = i; return found }
    END {
        if (minutes < least) exit
        while ((i = shortest()) && minutes * share[i] / all < least - 1e-9) {
            out[i] = 1; all -= share[i]; split(line[i], word)
            print "too little time for " word[1] ": it is left out" >"/dev/stderr"
        }
        for (i = 1; i <= n; i++) if (!(i in out)) printf "%.2f%s\n", minutes * share[i] / all - start, line[i]
    }' <<<"$TABLE")
[ -n "$plan" ] || usage "$minutes minutes are below the $LEAST that a recipe needs."

pack() { # NAME: the files of a finished run, in parts that are not too large
    local stage="$runs/packed/$1"
    rm -rf "$stage" && mkdir -p "$stage" "$out"
    cp "$runs/$1"/README.md "$runs/$1"/config.json "$runs/$1"/recipe.yaml "$runs/$1"/metrics.jsonl "$runs/$1"/model*.safetensors* "$stage"
    cp "$runs/$1.json" "$stage/train.json"
    rm -f "$out/$1".tar*
    tar -C "$runs/packed" -cf "$runs/$1.tar" "$1"
    if [ "$(wc -c <"$runs/$1.tar")" -le "$MOST" ]; then
        mv "$runs/$1.tar" "$out/$1.tar"
    else
        (cd "$out" && split -b "$MOST" -d - "$1.tar.") <"$runs/$1.tar"
        rm "$runs/$1.tar"
    fi
    rm -rf "$stage"
}

code=0
deadline=$(awk -v minutes="$minutes" -v now="$(date +%s)" 'BEGIN { printf "%d", now + 60 * minutes }')
while read -r share name options; do
    read -r -a more <<<"$options"
    command=($PATCHCERT train --recipe "$name" --max-minutes "$share" --device "$device" --out "$runs/$name"
        --json "$runs/$name.json" ${more[@]+"${more[@]}"} ${train[@]+"${train[@]}"})
    if [ -n "$dry" ]; then
        echo "$share minutes: ${command[*]}"
        continue
    fi
    if ls "$out/$name".tar* >/dev/null 2>&1; then
        echo "$name is finished: $(ls "$out/$name".tar* | tr '\n' ' ')" >&2
        continue
    fi
    if awk -v share="$share" -v left="$((deadline - $(date +%s)))" 'BEGIN { exit left + 15 >= 60 * share }'; then
        echo "$name: no time is left; the same command goes on here" >&2
        code=130
        break
    fi
    mkdir -p "$runs"
    echo "$name: $share minutes" >&2
    if "${command[@]}" </dev/null; then
        pack "$name"
    else
        code=$?
        echo "$name ended with exit code $code; the same command goes on here" >&2
        [ "$code" -lt 128 ] || break # stopped, as by Ctrl-C
    fi
done <<<"$plan"
exit "$code"
