"""Results as rows of text. Every table says threat, guarantee and count; all its rows are of one guarantee."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchcert_cli.arithmetic import Arithmetic, former
from patchcert_cli.data.datasets import own

Rows = list[tuple[str, str]]
EMPIRICAL = " (empirical: a stronger attack may find more)"
ANYWHERE = "anywhere in the image, any content in [0, 1]"
PROOFS = {  # the names of proofs, in words
    "best": "interval bounds, and linear ones where these leave something open",
    "interval": "interval bounds",
    "linear": "linear bounds",
    "exact": "the exact worst case of the votes",
    "3.1": "condition 3.1 of BagCert",
    "3.2": "condition 3.2 of BagCert",
    "3.3": "condition 3.3 of BagCert",
    "masking": "the exact worst case of robust masking",
    "rows": "double masking, for each location one mask with every other mask",
    "pairs": "double masking, all pairs of masks",
    "agreement": "for each location one mask that agrees with the answer",
    "all": "every mask agrees with the answer",
}
AT_CHANCE = (
    "the accuracy is at chance: one and the same answer is right on {:.1f} % of these images."
    " The model has learned next to nothing; give it more --epochs, or another --learning-rate"
)
KEPT = {"recovery": "", "detection": " or with an alarm"}  # what else counts as withstood


def share(fraction: float, count: int, total: int) -> str:
    """``61.85 % (6185/10000)``."""
    return f"{100 * fraction:.2f} % ({count}/{total})"


def certify_rows(result: dict[str, Any]) -> Rows:
    """What a certify run found, claim by claim."""
    counts, images, claims = result["counts"], result["images"], claim_list(result)
    rows = [
        ("model", _model(result)),
        ("data", _data(result)),
        *_plain(result),
        ("clean", share(result["clean_accuracy"], counts["clean"], images) + (" with the defense" if _plain(result) else "")),
        *_alarms(claims[0]),
    ]
    if len(claims) == 1:
        rows.insert(2, ("threat", f"{result['threat']}, {ANYWHERE}"))
        proof = PROOFS.get(claims[0]["method"], claims[0]["method"])
        rows += [("certified", _certified(claims[0])), ("guarantee", f"{_promised(claims[0])}, proof: {proof}")]
    else:
        rows.append(("guarantee", f"{_promised(claims[0])}; {ANYWHERE}"))
        if "patch_area" in result:
            rows.append(("shapes", f"the largest of at most {result['patch_area']} pixels, one of each height"))
        several = len({claim["method"] for claim in claims}) > 1
        rows += [(claim["threat"] + (f", {claim['method']}" if several else ""), _certified(claim)) for claim in claims]
    for one in compared(result):
        said = [f"{name} {share(one[name] / images, one[name], images)}" for name in ("alarms", "clean", "certified")]
        rows.append((f"threshold {one['threshold']:g}", ", ".join(said)))
    rows.append(_arithmetic(claim["arithmetic"] for claim in claims))
    return [*rows, ("time", _time(result)), ("records", str(result["records"]))]


def _plain(result: dict[str, Any]) -> Rows:
    """What a plain classifier is given and gets right without the defense; nothing of other models."""
    if "plain_accuracy" not in result:
        return []
    right = share(result["plain_accuracy"], result["plain_right"], result["images"])
    return [("in front", result["in_front"]), ("plain", f"{right} without defense and masks")]


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What other thresholds of certified detection would give, a row each, for the first claim; empty if nobody asked."""
    first = result.get("claims", [result])[0]
    return [{**one, "images": result["images"], "threat": first["threat"]} for one in first.get("thresholds", [])]


def _arithmetic(said: Iterable[str]) -> tuple[str, str]:
    """What is known of the rounding behind some certificates: each word with its meaning."""
    return "arithmetic", "; ".join(f"{one}: {Arithmetic(one).meaning}" for one in dict.fromkeys(said))


def verify_rows(outcome: dict[str, Any]) -> Rows:
    """What comparing a claim with its weights found."""
    images, most = outcome["images"], outcome["false_share_at_most"]
    agree = f"{outcome['agree']}/{images} records agree"
    if most is not None and images < outcome["of"]:
        agree += f"; with 95 % confidence at most {100 * most:.2f} % of all {outcome['of']} are false"
    rows = [
        ("model", f"{outcome['model']} (sha256 {outcome['model_sha256'][:12]}…)"),
        ("claim", f"{outcome['claim']} on {outcome['dataset']} {outcome['split']}"),
        ("records", agree),
    ]
    for row in outcome["different"]:
        said, found = (", ".join(f"{key} {value}" for key, value in row[side].items()) for side in ("published", "found"))
        rows.append((f"image {row['index']}", f"published: {said}; found: {found}"))
    broken = f"broke {len(outcome['broken'])} of {outcome['attacked']} certified" if outcome["attacked"] else "not run"
    if outcome["attacked"] < outcome["certified"]:
        broken += f" ({outcome['certified']} are certified)"
    if outcome.get("overstated"):
        said, found = outcome["published_arithmetic"], outcome["arithmetic"]
        rows.append(("overstated", f"published as {said}, but certified again it is {found}"))
    rows += [_arithmetic([outcome["arithmetic"]])]
    rows += [("attack", broken + (f" (indices {', '.join(map(str, outcome['broken']))})" if outcome["broken"] else ""))]
    verdict = "claim consistent" if outcome["holds"] else "claim does not reproduce"
    return [*rows, ("verdict", verdict), ("time", f"{outcome['seconds']:.1f} s"), ("out", outcome["out"])]


def claim_list(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each claim of a certify result: threat, method, guarantee, arithmetic, images, counts, interval."""
    return [
        {
            **{key: claim[key] for key in ("threat", "method", "guarantee", "certified_interval")},
            "arithmetic": claim.get("arithmetic") or str(former(result["defense"])),
            "images": result["images"],
            **claim["counts"],
        }
        for claim in result.get("claims", [result])
    ]


def _alarms(claim: dict[str, Any]) -> Rows:
    """How many images raise an alarm unattacked; nothing where the defense raises none."""
    if "alarms" not in claim:
        return []
    return [("alarms", f"{share(claim['alarms'] / claim['images'], claim['alarms'], claim['images'])} of the unattacked images")]


def plot_title(result: dict[str, Any]) -> str:
    """What a plot of a certify result is about."""
    claims = claim_list(result)
    guarantee, measured = claims[0]["guarantee"], any(claim["arithmetic"] == Arithmetic.MEASURED for claim in claims)
    about = "" if guarantee == "recovery" else f", guarantee: {guarantee}"
    about += ", rounding measured, not proven" if measured else ""
    dataset = named(result["dataset"])
    part = "" if result["full_split"] else ", a part of it"
    return f"{named(result['model'])}\n{dataset} {result['split']}{part}{about}"


def named(text: str) -> str:
    """A model or a data set without the folders that it lies in: where they are on somebody's disk is no name."""
    kind, colon, path = text.partition(":") if text.startswith("imagefolder:") else ("", "", text)
    return kind + colon + (Path(path).name if Path(path).is_absolute() or kind else path)


def single_rows(found: dict[str, Any]) -> Rows:
    """What certifying one picture found."""
    rows = [
        ("image", str(found["image"])),
        ("model", _model(found)),
        ("prediction", _answer(found)),
    ]
    if "plain" in found:
        rows += [("in front", found["in_front"]), ("plain", f"{found['plain_label']} without defense and masks")]
    for claim in found["claims"]:
        top, left, height, width = claim["worst"]
        without = " without an alarm" if claim["guarantee"] == "detection" else ""
        verdict = f"certified: no such change alters the prediction{without}" if claim["certified"] else "not certified"
        place = f"weakest at row {top}, column {left} ({height}x{width}), towards {claim['rival']}"
        rows.append((f"{claim['threat']}, {claim['method']}", f"{verdict}; margin {claim['margin']:g}, {place}"))
    rows.append(_arithmetic(claim["arithmetic"] for claim in found["claims"]))
    if "map" in found:
        rows.append(("locations", f"{found['weak_locations']} of {found['locations']} are weak; map in {found['map']}"))
    return rows


def _answer(found: dict[str, Any]) -> str:
    """What the model answers for one picture; an alarm is no class."""
    return str(found["class"]) if found["prediction"] < 0 else f"{found['class']} (class {found['prediction']})"


def _certified(claim: dict[str, Any]) -> str:
    low, high = claim["certified_interval"]
    said = share(claim["certified"] / claim["images"], claim["certified"], claim["images"])
    return f"{said}, 95 % interval {100 * low:.2f} to {100 * high:.2f} %"


def _promised(claim: dict[str, Any]) -> str:
    """The guarantee, and what it means where an alarm may be raised."""
    kept = KEPT[claim["guarantee"]]
    return f"{claim['guarantee']} (answered right{kept})" if kept else str(claim["guarantee"])


def _model(result: dict[str, Any]) -> str:
    return f"{result['model']} ({result['defense']}, {result['model_source']}, sha256 {result['model_sha256'][:12]})"


def attack_rows(result: dict[str, Any]) -> Rows:
    """What an attack run found."""
    counts, images = result["counts"], result["images"]
    survived, guarantee = round(result["attacked_accuracy"] * images), result.get("guarantee", "recovery")
    rows = [
        ("model", _model(result)),
        ("data", _data(result)),
        ("threat", f"{result['threat']}, {ANYWHERE}"),
        *_plain(result),
        ("clean", share(result["clean_accuracy"], counts["clean"], images) + (" with the defense" if _plain(result) else "")),
        ("right under attack", f"{share(result['attacked_accuracy'], survived, images)}{KEPT[guarantee]}{EMPIRICAL}"),
        ("judged for", guarantee),
    ]
    if "pasted" in result:
        rows += _pasted(result["pasted"])
    if "certified_accuracy" in result:
        rows.append(("certified", share(result["certified_accuracy"], counts["certified"], images)))
        rows.append(("verdict", f"{len(result['broken'])} certified images flipped"))
        rows.append(_arithmetic([result.get("arithmetic") or former(result["defense"])]))
    if result.get("left"):
        of = images + result["left"]
        rows.append(("left", f"{result['left']} of {of} images: the time was up; the same command goes on with them"))
    return [*rows, ("queries", f"{result['queries']:,}"), ("time", _time(result)), ("records", str(result["records"]))]


def _pasted(found: dict[str, int]) -> Rows:
    """What given pictures did, pasting by pasting, where the answer was right."""
    rows = []
    for name, prefix in (("pasted", ""), *([("plain network", "plain_")] if "plain_right" in found else [])):
        images, tries, changed = (found[prefix + key] for key in ("right", "tries", "changed"))
        said = share(changed / max(tries, 1), changed, tries)
        rows.append((name, f"{said} pastings change a right answer ({images} images are answered right)"))
    return rows


def plain_rows(values: dict[str, Any]) -> Rows:
    """Names and values as they are."""
    return [(name.replace("_", " "), str(value)) for name, value in values.items()]


def train_rows(result: dict[str, Any]) -> Rows:
    """What a training run made."""
    counts, images = result["validation"]["counts"], result["validation"]["images"]
    spent = f"{result['epochs']} epochs in {result['seconds']:.0f} s on {result['device']}"
    kept = KEPT[result.get("guarantee", "recovery")]
    return [
        ("model", f"{result['out']} ({result['defense']}, sha256 {result['model_sha256'][:12]})"),
        ("trained for", f"{result['threat']} on {result['dataset']}, {spent}"),
        ("clean", f"{share(counts['clean'] / images, counts['clean'], images)} of the held-out training images"),
        (
            "certified",
            f"{share(counts['certified'] / images, counts['certified'], images)}{kept} of the held-out training images",
        ),
        ("next", f"patchcert certify {result['out']}" + (" --data imagefolder:..." if own(result["dataset"]) else "")),
        *([("remark", AT_CHANCE.format(100 * result["chance"]))] if result.get("at_chance") else []),
    ]


def _data(result: dict[str, Any]) -> str:
    part = "whole split" if result["full_split"] else "subset"
    return f"{result['dataset']} {result['split']}, {result['images']} images ({part}, {result['data_source']})"


def _time(result: dict[str, Any]) -> str:
    pace = speed(result["images_per_second"])
    some = f" for {result['images'] - result['resumed']} images" if result.get("resumed") else ""
    return f"{result['seconds']:.1f} s{some}{f', {pace}' if pace else ''} on {result['device']}"


def speed(images_per_second: float) -> str:
    """Images per second, below one of them seconds per image; empty if no image was computed."""
    if images_per_second <= 0:
        return ""
    if images_per_second < 1:
        return f"{1 / images_per_second:.{1 if images_per_second > 0.01 else 0}f} s an image"
    return f"{images_per_second:.{0 if images_per_second >= 9.95 else 1}f} images/s"
