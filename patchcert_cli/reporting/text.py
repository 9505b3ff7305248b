"""Results as rows of text. Every table says threat, guarantee and count; all its rows are of one guarantee."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchcert_cli.arithmetic import Arithmetic, former
from patchcert_cli.data.datasets import is_custom
from patchcert_cli.reporting.numbers import interval, percent, plural, share
from patchcert_cli.threats import Guarantee

Rows = list[tuple[str, str]]
EMPIRICAL = " (empirical: a stronger attack may find more)"
NO_CERTIFICATE = "nothing: this defense has no certificate"
ANYWHERE = "anywhere in the image, any content in [0, 1]"
PROOFS = {  # descriptions of proofs
    "best": "interval bounds, and linear ones for images that these leave undecided",
    "interval": "interval bounds",
    "linear": "linear bounds",
    "exact": "the exact worst case of the votes",
    "3.1": "condition 3.1 of BagCert",
    "3.2": "condition 3.2 of BagCert",
    "3.3": "condition 3.3 of BagCert",
    "masking": "the exact worst case of robust masking",
    "rows": "double masking, for each location one mask with every other mask",
    "pairs": "double masking, all pairs of masks",
    "combined": "what can be forced of each member at the same location",
    "agreement": "for each location one mask that agrees with the answer",
    "all": "every mask agrees with the answer",
}
AT_CHANCE = (
    "the accuracy is at chance: one and the same answer is right on {:.1f} % of these images."
    " The model has learned next to nothing; give it more --epochs, or another --learning-rate"
)
OR_ALARM = {"recovery": "", "detection": " or with an alarm", "none": ""}  # detection counts an alarm as a success too


def certify_rows(result: dict[str, Any]) -> Rows:
    """The result of a certify run, claim by claim."""
    counts, images, claims = result["counts"], result["images"], claim_list(result)
    rows = [
        ("model", _model(result)),
        ("data", _data(result)),
        *_plain(result),
        ("clean", share(counts["clean"], images) + (" with the defense" if _plain(result) else "")),
        *_alarms(claims[0]),
    ]
    if len(claims) == 1:
        rows.insert(2, ("threat", f"{claims[0]['threat']}, {ANYWHERE}"))
        proof = PROOFS.get(claims[0]["method"], claims[0]["method"])
        rows += [*_first(claims[0]), (f"certified{ranked(claims[0])}", _certified(claims[0])), *_published(claims[0])]
        rows += [("guarantee", f"{_promised(claims[0])}, proof: {proof}")]
    else:
        rows.append(("guarantee", f"{_promised(claims[0])}; {ANYWHERE}"))
        if "patch_area" in result:
            rows.append(("shapes", f"the largest of at most {result['patch_area']} pixels, one of each height"))
        several = len({claim["method"] for claim in claims}) > 1
        for claim in claims:
            rows.append((claim["threat"] + ranked(claim) + (f", {claim['method']}" if several else ""), _certified(claim)))
            rows += _published(claim)
    for one in compared(result):
        named = {"alarms": "alarms", "clean": "clean", "certified": "certified", "or_alarm": "published metric"}
        shares = [f"{name} {share(one[key], images)}" for key, name in named.items() if key in one]
        rows.append((f"threshold {one['threshold']:g}", ", ".join(shares)))
    rows.append(_arithmetic(claim["arithmetic"] for claim in claims))
    return [*rows, ("time", _time(result)), ("records", str(result["records"]))]


def _plain(result: dict[str, Any]) -> Rows:
    """For a plain classifier: its preprocessing, and its accuracy without the defense. No rows for other models."""
    if "plain_accuracy" not in result:
        return []
    right = share(result["plain_right"], result["images"])
    return [("in front", result["in_front"]), ("plain", f"{right} without defense and masks")]


def compared(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What other thresholds of certified detection would give, a row each, for the first claim; empty if not requested."""
    first = result["claims"][0]
    return [{**one, "images": result["images"], "threat": first["threat"]} for one in first.get("thresholds", [])]


def _arithmetic(values: Iterable[str]) -> tuple[str, str]:
    """How certificates account for rounding: each different value with its meaning."""
    return "arithmetic", "; ".join(f"{one}: {Arithmetic(one).meaning}" for one in dict.fromkeys(values))


def verify_rows(outcome: dict[str, Any]) -> Rows:
    """The result of ``zoo verify``: a published claim compared with what its weights give."""
    images, most = outcome["images"], outcome["false_share_at_most"]
    agree = f"{outcome['agree']}/{images} records agree"
    if most is not None and images < outcome["of"]:
        agree += f"; with 95 % confidence at most {percent(most)} % of all {outcome['of']} are false"
    rows = [
        ("model", f"{outcome['model']} (sha256 {outcome['model_sha256'][:12]}…)"),
        ("claim", f"{outcome['claim']} on {outcome['dataset']} {outcome['split']}"),
        ("records", agree),
    ]
    for row in outcome["different"]:
        sides = (f"{side}: " + ", ".join(f"{key} {value}" for key, value in row[side].items()) for side in ("published", "found"))
        rows.append((f"image {row['index']}", "; ".join(sides)))
    broken = f"broke {len(outcome['broken'])} of {outcome['attacked']} certified" if outcome["attacked"] else "not run"
    if outcome["attacked"] < outcome["certified"]:
        broken += f" ({outcome['certified']} are certified)"
    if outcome.get("overstated"):
        published, own_result = outcome["published_arithmetic"], outcome["arithmetic"]
        rows.append(("overstated", f"published as {published}, but certified again it is {own_result}"))
    rows += [_arithmetic([outcome["arithmetic"]])]
    rows += [("attack", broken + (f" (indices {', '.join(map(str, outcome['broken']))})" if outcome["broken"] else ""))]
    verdict = "claim consistent" if outcome["holds"] else "claim does not reproduce"
    return [*rows, ("verdict", verdict), ("time", f"{outcome['seconds']:.1f} s"), ("out", outcome["out"])]


def claim_list(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each claim of a certify result: threat, method, guarantee, arithmetic, images, counts, interval."""
    return [
        {
            **{key: claim[key] for key in ("threat", "method", "guarantee", "certified_interval")},
            **({"top": claim["top"]} if "top" in claim else {}),
            "arithmetic": claim.get("arithmetic") or str(former(result["defense"])),
            "images": result["images"],
            **claim["counts"],
        }
        for claim in result["claims"]
    ]


def ranked(claim: dict[str, Any]) -> str:
    """`` top-k`` of a claim about the first k classes, for the name of its numbers; else nothing."""
    return f" top-{claim['top']}" if "top" in claim else ""


def _first(claim: dict[str, Any]) -> Rows:
    """How many labels are among the first k classes without an attack; no row for a claim about the answer."""
    return [(f"clean{ranked(claim)}", share(claim["clean"], claim["images"]))] if "top" in claim else []


def _alarms(claim: dict[str, Any]) -> Rows:
    """How many unattacked images raise an alarm; no row if the defense raises none."""
    if "alarms" not in claim:
        return []
    return [("alarms", f"{share(claim['alarms'], claim['images'])} of the unattacked images")]


def _published(claim: dict[str, Any]) -> Rows:
    """The published metric of certified detection; no row for other guarantees, and for results that do not say it."""
    if "or_alarm" not in claim:
        return []
    return [("published metric", f"{share(claim['or_alarm'], claim['images'])} certified incl. clean alerts")]


def plot_title(result: dict[str, Any]) -> str:
    """The title of a plot of a certify result: the model, and below it the data and the guarantee."""
    claims = claim_list(result)
    guarantee, measured = claims[0]["guarantee"], any(claim["arithmetic"] == Arithmetic.MEASURED for claim in claims)
    about = "" if guarantee == "recovery" else f", guarantee: {guarantee}"
    about += ", rounding measured, not proven" if measured else ""
    dataset = named(result["dataset"])
    part = "" if result["full_split"] else ", a part of it"
    return f"{named(result['model'])}\n{dataset} {result['split']}{part}{about}"


def named(text: str) -> str:
    """The name of a model or data set without the folders that contain it, which differ between machines."""
    kind, colon, path = text.partition(":") if text.startswith("imagefolder:") else ("", "", text)
    return kind + colon + (Path(path).name if Path(path).is_absolute() or kind else path)


def single_rows(result: dict[str, Any]) -> Rows:
    """The result of certifying one image."""
    rows = [
        ("image", str(result["image"])),
        ("model", _model(result)),
        ("prediction", _answer(result)),
    ]
    if "plain" in result:
        rows += [("in front", result["in_front"]), ("plain", f"{result['plain_label']} without defense and masks")]
    for claim in result["claims"]:
        top, left, height, width = claim["worst"]
        without = " without an alarm" if claim["guarantee"] == "detection" else ""
        verdict = f"certified: no such change {_done(claim)}{without}" if claim["certified"] else "not certified"
        place = f"weakest at row {top}, column {left} ({height}x{width}), towards {claim['runner_up']}"
        rows.append((f"{claim['threat']}, {claim['method']}", f"{verdict}; margin {claim['margin']:g}, {place}"))
        if "top" in claim:
            places = zip(claim["ranking"], claim["stays"], strict=True)
            rows.append(
                (f"first {claim['top']}", ", ".join(f"{name} ({'stays' if stays else 'open'})" for name, stays in places))
            )
    rows.append(_arithmetic(claim["arithmetic"] for claim in result["claims"]))
    if "map" in result:
        rows.append(("locations", f"{result['weak_locations']} of {result['locations']} are weak; map in {result['map']}"))
    return rows


def _done(claim: dict[str, Any]) -> str:
    """What a certificate of one image excludes."""
    return f"expels the prediction from the first {claim['top']}" if "top" in claim else "alters the prediction"


def _answer(result: dict[str, Any]) -> str:
    """The prediction for one image: a class, or an alarm."""
    return str(result["class"]) if result["prediction"] < 0 else f"{result['class']} (class {result['prediction']})"


def _certified(claim: dict[str, Any]) -> str:
    silent = ", silent on the clean image, right" if claim["guarantee"] == "detection" else ""
    return f"{share(claim['certified'], claim['images'])}{silent}, 95 % interval {interval(claim['certified_interval'])} %"


def _promised(claim: dict[str, Any]) -> str:
    """The guarantee; for detection with its meaning."""
    alarm = OR_ALARM[claim["guarantee"]]
    return f"{claim['guarantee']} (answered right{alarm})" if alarm else str(claim["guarantee"])


def _model(result: dict[str, Any]) -> str:
    return f"{result['model']} ({result['defense']}, {result['model_source']}, sha256 {result['model_sha256'][:12]})"


def attack_rows(result: dict[str, Any]) -> Rows:
    """The result of an attack run."""
    counts, images = result["counts"], result["images"]
    survived, guarantee = round(result["attacked_accuracy"] * images), result.get("guarantee", "recovery")
    rows = [
        ("model", _model(result)),
        ("data", _data(result)),
        ("threat", f"{result['threat']}, {ANYWHERE}"),
        *_plain(result),
        ("clean", share(counts["clean"], images) + (" with the defense" if _plain(result) else "")),
        ("right under attack", f"{share(survived, images)}{OR_ALARM[guarantee]}{EMPIRICAL}"),
        ("judged for", guarantee) if Guarantee(guarantee).proves else ("certified", NO_CERTIFICATE),
    ]
    if "pasted" in result:
        rows += _pasted(result["pasted"])
    if "by" in result:
        rows.append(("flipped", f"{flipped_by(result)}; {share(result['flipped'], images)} in all"))
    for claim in result["claims"]:
        rows.append(("certified", share(claim["counts"]["certified"], images)))
        rows.append(("verdict", f"{len(result['broken'])} certified images flipped"))
        rows.append(_arithmetic([claim.get("arithmetic") or former(result["defense"])]))
    if result.get("left"):
        of = images + result["left"]
        rows.append(("left", f"{result['left']} of {of} images: the time was up; the same command goes on with them"))
    rows += _saved(result)
    return [*rows, ("queries", f"{result['queries']:,}"), ("time", _time(result)), ("records", str(result["records"]))]


def attacked_image_rows(result: dict[str, Any]) -> Rows:
    """The result of attacking one image."""
    rows = [("image", str(result["image"])), ("model", _model(result)), ("prediction", _answer(result))]
    if "plain" in result:
        rows += [("in front", result["in_front"]), ("plain", f"{result['plain_label']} without defense and masks")]
    rows.append(("threat", f"{result['threat']}, {ANYWHERE}"))
    if result["flipped"]:
        top, left, height, width = result["changed"]
        by = f" by {result['by']}" if "by" in result else ""
        where = f"within {height}x{width} pixels at row {top}, column {left}"
        rows.append(("flipped", f"to {result['attacked_class']}{by} after {result['flipped_at']:,} queries, {where}"))
    else:
        rows.append(("flipped", f"no{EMPIRICAL}"))
    for claim in result["claims"]:
        rows.append(("certified", "yes" if claim["certified"] else f"no: margin {claim['margin']:g}"))
    rows += _saved(result)
    return [*rows, ("queries", f"{result['queries']:,}"), *([("map", result["map"])] if "map" in result else [])]


def _saved(result: dict[str, Any]) -> Rows:
    """Which adversarial images were kept, and what rounding to 8 bits does to them."""
    if "saved" not in result:
        return []
    kept = result["saved"]
    rounded = f"; rounded to 8 bits, {kept['png_flips']} of {kept['png']} still flip the answer" if kept["png"] else ""
    return [("saved", f"{kept['images']} adversarial images in {kept['folder']}{rounded}")]


def flipped_by(result: dict[str, Any]) -> str:
    """How many images each of several attacks flipped, of those that it was given."""
    each = [f"{one['attack']} {one['flipped']} of {one['images']} images" for one in result["by"]]
    return ", ".join(each[:1] + [f"{text} left" for text in each[1:]])


def _pasted(counts: dict[str, int]) -> Rows:
    """How often pasting the given images changed a right answer."""
    rows = []
    for name, prefix in (("pasted", ""), *([("plain network", "plain_")] if "plain_right" in counts else [])):
        images, tries, changed = (counts[prefix + key] for key in ("right", "tries", "changed"))
        rows.append((name, f"{share(changed, tries)} pastings change a right answer ({images} images are answered right)"))
    return rows


def plain_rows(values: dict[str, Any]) -> Rows:
    """A row for each name and value."""
    return [(name.replace("_", " "), str(value)) for name, value in values.items()]


def train_rows(result: dict[str, Any]) -> Rows:
    """The result of a training run."""
    counts, images = result["validation"]["counts"], result["validation"]["images"]
    spent = f"{plural(result['epochs'], 'epoch')} in {result['seconds']:.0f} s on {result['device']}"
    alarm = OR_ALARM[result.get("guarantee", "recovery")]
    return [
        ("model", f"{result['out']} ({result['defense']}, sha256 {result['model_sha256'][:12]})"),
        ("trained for", f"{result['threat']} on {result['dataset']}, {spent}"),
        ("clean", f"{share(counts['clean'], images)} of the held-out training images"),
        (
            "certified",
            f"{share(counts['certified'], images)}{alarm} of the held-out training images",
        ),
        ("next", f"patchcert certify {result['out']}" + (" --data imagefolder:..." if is_custom(result["dataset"]) else "")),
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
    """Images per second, or if slower than that, seconds per image; empty if no image was computed."""
    if images_per_second <= 0:
        return ""
    if images_per_second < 1:
        return f"{1 / images_per_second:.{1 if images_per_second > 0.01 else 0}f} s an image"
    return f"{images_per_second:.{0 if images_per_second >= 9.95 else 1}f} images/s"
