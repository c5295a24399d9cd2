"""Check that a card says what its report says, and nothing else: it is rendered anew, and compared line by line.

What a card has beside its report (a title, a licence, facts of the training, measured numbers) is taken from the card
where it is just what this package writes, checked against the other files where they know it, and rendered with the
rest. What the owner added belongs at the end, below the heading [`OWNERS_PART`]; there it is listed, not checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.privacy.privacy_report import unit_of_report
from dp_curriculum.privacy.verification import Check, not_checked, version_text, written_by_this_version
from dp_curriculum.sharing.dataset_card import dataset_body, dataset_metadata
from dp_curriculum.sharing.model_card import (
    DEFAULT_TITLE,
    MAX_NAMED_CLASSES,
    NOT_PRIVATE,
    card_body,
    card_metadata,
    class_text,
    yaml_text,
)
from dp_curriculum.sharing.report_words import is_hub_id
from dp_curriculum.sharing.starting_words import autoencoder_of, describe_start, start_of
from dp_curriculum.sharing.strict import AmbiguousFile, read_yaml, same, shorten


OWNERS_PART = "## Added by the owner"
_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"
# A name as `name_text` writes it: plain, or as code between more backticks than there are in it.
_QUOTED = "|".join(rf"(?<!`)`{{{n}}}(?!`)(?:(?!`{{{n}}}).)+(?<!`)`{{{n}}}(?!`)" for n in (1, 2, 3))
_NAME = rf"(?:(?!www\.)[^\W_]+(?:[-_./][^\W_]+)*|{_QUOTED})"
_LESSON = r"[a-z][a-z0-9]*(?: (?!and )[a-z0-9]+){0,2}"  # an underscore shows as a space
# The facts that the cards of a training tell, in their order; each matches name and value of a line. A fact that
# finishing.py begins to tell needs its line here: the cards of all trainings are tested.
_TRAINING = (
    r"images: cropped to squares of \d+x\d+, (?:grey|RGB); pixels of more than 8 bits range over "
    rf"(?:-?{_NUMBER} to -?{_NUMBER}|0 to 65535, floats over 0 to 1); grey level behind transparent pixels {_NUMBER}",
    r"model: UNet2DModel, [\d,]+ parameters, \d+x\d+x\d+(?: in patches of \d+x\d+)?",
    r"start: .{1,600}",  # what the report says, word for word
    r"autoencoder: .{1,600}",
    r"lesson moments: in closed form, a prior under the network: the noisy mean and covariance of each class"
    r"(?:, paid for by its two queries|, and those of \d+ parts of it, paid for by its three queries)",
    r"public images: [\d,]+ are in the model, moved to the released moments of its classes; it draws from them",
    rf"lessons? {_LESSON}(?: and {_LESSON})*(?:, taught at once)?: (?:at most )?\d+ steps of \d+ images, "
    rf"Adam with learning rate {_NUMBER}; (?:it spends|they spend) nothing(?: beyond (?:its query|their queries))?",
    rf"DP-SGD: \d+ steps of {_NUMBER} (?:images on average, \d+ noise draws? an image|persons on average, \d+ noise "
    rf"draws? a person), Adam with learning rate {_NUMBER}",
    rf"weights of DP-SGD: (?:LoRA of rank \d+ and scale {_NUMBER} on [\w.]+(?:, [\w.]+)*|the attention blocks|biases "
    r"and normalization)(?: and the class embedding)?: [\d,]+ weights; the others are as the stages before left them",
    rf"sampler: EDM stochastic Heun, \d+ steps, S_churn {_NUMBER}",
)
_MAKING = (
    rf"classes, weights: (?:all classes alike|{_NUMBER}(?: {_NUMBER})*)",
    r"num inference steps: (?:\d+|None)",
    rf"guidance scale: (?:{_NUMBER}|None)",
    rf"s churn: (?:{_NUMBER}|None)",
    r"filter: by a classifier that was trained on other generated images",  # only where there was one
)
_NAMES_OF_MAKING = ("classes, weights", "num inference steps", "guidance scale", "s churn")
# Measured numbers, and what they were measured on, as `evaluate` names them; `{}` is the dataset and its split.
_METRIC = r"accuracy_[a-z]+|fd_classifier|fd_haar|fd_haar_floor|precision|recall|density|coverage|fid|kid"
_MEASURED = (
    r"trained on [\d,]+ generated images, tested on [\d,]+ of {}",
    r"[\d,]+ generated images against [\d,]+ of {}, in features of a CNN trained on the latter(?:, k = 4)?",
    r"[\d,]+ generated images against [\d,]+ of {}, in Haar features",
    r"two halves of [\d,]+ of {}, in Haar features",
    r"[\d,]+ generated images against [\d,]+ of {}, in features of Inception v3",
)
_MAX_SHOWN = 3  # lines


@dataclass(frozen=True)
class Known:
    """
    Facts that the files beside a card have about it; `None` where there is no such file.

    Args:
        repo_id (`str`, *optional*): The repository that the card lies in.
        class_names (`tuple[str, ...]`, *optional*): Classes of `model_index.json`.
        model (`str`, *optional*): The network, as the card describes it.
        sampler (`str`, *optional*): The sampler, as the card describes it.
    """

    repo_id: str | None = None
    class_names: tuple[str, ...] | None = None
    model: str | None = None
    sampler: str | None = None


NOTHING_KNOWN = Known()
Report = Mapping[str, Any]
Body = Callable[[str, Mapping[str, Any]], tuple[dict[str, Any], str]]  # (text, metadata) to those that are expected


def split_card(text: str) -> tuple[str, str]:
    """
    Metadata and text of a card.

    Raises:
        AmbiguousFile: If a program may find other metadata than we do, or none.
    """
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if match is None:
        raise AmbiguousFile("it does not begin with metadata between two lines of ---")
    return match[1], text[match.end() :]


def listed_files(text: str) -> dict[str, str]:
    """The hashes that a card lists under "Files", by name."""
    return _rows_of_files(split_card(text)[1])


def check_model_card(text: str, report: Report, known: Known = NOTHING_KNOWN) -> list[Check]:
    """
    Compares the card of a model with one that is rendered from its report.

    Args:
        text (`str`): The card, as its bytes are: no line ending is translated.
        report (`Mapping`): Follows the schema.
        known ([`Known`], *optional*): What other files know.

    Returns:
        `list[Check]`: One of the card, and one of what the owner added, where there is such. A card of another
        version is not checked, but for its copy of the report.

    Raises:
        AmbiguousFile: If the metadata can be read in several ways.
    """
    return _check(text, report, lambda body, metadata: _expected_model(body, metadata, report, known), known)


def check_dataset_card(text: str, report: Report, known: Known = NOTHING_KNOWN) -> list[Check]:
    """Compares the card of a synthetic dataset; as [`check_model_card`]."""
    return _check(text, report, lambda body, metadata: _expected_dataset(body, metadata, report), known)


def _check(text: str, report: Report, render: Body, known: Known) -> list[Check]:
    front, body = split_card(text)
    metadata = read_yaml(front)
    if not (isinstance(metadata, dict) and same(metadata.get("differential_privacy"), report)):
        return [Check("card", "the same block as privacy.json", "another block", False)]
    if not written_by_this_version(report):
        return [not_checked("card", "what its version writes", version_text(report))]
    repo_id = _repo_id(body)
    if known.repo_id is not None and repo_id.casefold() != known.repo_id.casefold():
        return [Check("card", f"of {known.repo_id}", f"of {shorten(repo_id)}", False)]
    expected_metadata, expected = render(body, metadata)
    problems = [*_metadata_problems(metadata, expected_metadata)]
    ours, mark, owners = body.partition(f"\n{OWNERS_PART}\n")
    if mark and ours == expected:
        problems += _leaves_its_place(owners)
    elif body != expected:
        problems.append(_first_difference(body, expected, first_line=front.count("\n") + 3))
    what = "what its report says, and nothing else"
    checks = [Check("card", what, problems[0] if problems else "it does", not problems)]
    owners_lines = [line for line in owners.split("\n") if line.strip()] or ([OWNERS_PART] if mark else [])
    added = [*_added_metadata(front, metadata, expected_metadata), *owners_lines]
    if added and not problems:
        shown = "; ".join(map(shorten, added[:_MAX_SHOWN])) + (f" and {len(added) - 3} more" if added[3:] else "")
        checks.append(not_checked("added to the card", "by its owner", f"not from the report: {shown}"))
    return checks


# --- the metadata --------------------------------------------------------------------------------------------------


def _metadata_problems(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    ours = {name: None for name in ("datasets", "model-index") if name in found}  # the Hub shows them beside the card
    for name, value in {**ours, **expected}.items():
        if name == "tags" and isinstance(found.get(name), list):
            missing = [tag for tag in value if tag not in found[name]]
            stamped = [tag for tag in found[name] if tag == "differential-privacy" and tag not in value]
            yield from (f"its tag {tag} is missing" for tag in missing)
            yield from (f"its tag {tag} is not from the report" for tag in stamped)
        elif not same(found.get(name), value):
            yield f"its metadata {name!r} are not from the report: {shorten(str(found.get(name)))}"


def _added_metadata(front: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name}: {found[name]}" for name in found if name not in expected)
    tags = found.get("tags")
    yield from (f"tag {tag}" for tag in (tags if isinstance(tags, list) else ()) if tag not in expected["tags"])
    # Other programs than ours may read 1_0 or 0o17 in another way; what we write is read in the same way by all.
    if front not in (yaml_text(found), yaml_text(found, width=80)):
        yield "metadata in another form than this package and huggingface_hub write"


def _licence(metadata: Mapping[str, Any]) -> str | None:
    value = metadata.get("license")
    return value if isinstance(value, str) and re.fullmatch(r"[a-z0-9.+-]{1,60}", value) else None


# --- the text ------------------------------------------------------------------------------------------------------


def _expected_model(
    body: str, metadata: Mapping[str, Any], report: Report, known: Known
) -> tuple[dict[str, Any], str]:
    repo_id, dataset_id = _repo_id(body), report["protected_dataset"]["name"]
    title = _first(r"# (.+)", body).removesuffix(NOT_PRIVATE)
    if title not in (repo_id, repo_id.rpartition("/")[2], DEFAULT_TITLE):
        title = repo_id
    metrics = [] if dataset_id is None else _metrics(metadata.get("model-index"), dataset_id)
    count = report["data_domain"].get("num_classes", 1)
    told = _first(rf"A class-conditional diffusion model \(({count} classes|classes: {_names(count)})\) for .*", body)
    expected = card_body(
        report,
        repo_id=repo_id,
        title=title,
        classes=told * told.isprintable() if known.class_names is None else class_text(known.class_names),
        num_classes=count,
        training=_training(body, report, known),
        metrics=metrics,
        files=_rows_of_files(body),
    )
    licence = _licence(metadata)
    return card_metadata(report, title=title, dataset_id=dataset_id, license=licence, metrics=metrics), expected


def _expected_dataset(body: str, metadata: Mapping[str, Any], report: Report) -> tuple[dict[str, Any], str]:
    repo_id, domain = _repo_id(body), report["data_domain"]
    count = domain.get("num_classes", 1)
    opening = rf"([\d,]{{1,20}}) images, (\d+x\d+ pixels, (?:grey|RGB)), of {count} classes "
    classes = rf"\(({_names(count)}(?:, \.\.\.)?)\), "
    source = r"generated by a model(?:, \[([\w./-]+)\]\(https://huggingface\.co/[\w./-]+\),)? that was trained with"
    about = re.search(f"^{opening}{classes}{source}$", body, re.MULTILINE)
    number, size, told, model_id = about.groups() if about and about[0].isprintable() else ("0", "", "", None)
    side, colours = domain.get("resolution"), {1: "grey", 3: "RGB"}.get(domain.get("num_channels"))
    num_images = int(number.replace(",", "") or 0)
    expected = dataset_body(
        report,
        repo_id=repo_id,
        num_images=num_images,
        image_size=size if None in (side, colours) else f"{side}x{side} pixels, {colours}",
        classes=told,
        num_classes=count,
        making={**dict.fromkeys(_NAMES_OF_MAKING, "told"), **dict(_facts(body, _MAKING))},
        model_id=model_id if model_id is not None and is_hub_id(model_id) else None,
        files=_rows_of_files(body),
    )
    licence = _licence(metadata)
    return dataset_metadata(report, repo_id=repo_id, num_images=num_images, license=licence), expected


def _repo_id(body: str) -> str:
    """The repository that a card names in its first example, if that can be one."""
    found = _first(r'(?:pipe = DPCurriculumPipeline\.from_pretrained|images = load_dataset)\("([\w./-]+)".*\)', body)
    return found if is_hub_id(found) else ""


def _names(count: int) -> str:
    """The form of a list of classes, the first of them where there are many."""
    return f"{_NAME}(?:, {_NAME}){{{max(0, min(count, MAX_NAMED_CLASSES) - 1)}}}"


def _training(body: str, report: Report, known: Known) -> dict[str, str]:
    """Facts of the training; those that other files or the report know are theirs, whatever the card says."""
    facts, rows = dict(_facts(body, _TRAINING)), report["mechanisms"]
    taken = sum(row["num_steps"] for row in rows if row["name"] == DP_SGD)
    start, encoder = start_of(report["public_data"]), autoencoder_of(report["public_data"])
    images = [data for data in report["public_data"] if not (data is start or data is encoder)]
    taught = bool(images) or any(row["name"] != DP_SGD for row in rows)
    tells_lessons, steps = any(name.startswith("lesson") for name in facts), facts.get("DP-SGD", "0 steps of ")
    is_of_unit = not taken or f" {unit_of_report(report)}s on average" in steps
    is_counted = steps.startswith(f"{taken} steps of ") and ("DP-SGD" in facts) == bool(taken)
    tells_models = ("start" in facts) == (start is not None) and ("autoencoder" in facts) == (encoder is not None)
    if not tells_models or tells_lessons != taught or not (is_counted and is_of_unit):
        return {"lessons and DP-SGD": "those of the report"}  # a line that no card has
    told = {name: "told" for name in ("model", "sampler") if name not in facts}
    known_facts = {name: value for name, value in (("model", known.model), ("sampler", known.sampler)) if value}
    known_facts |= {} if start is None else {"start": describe_start(start)}
    known_facts |= {} if encoder is None else {"autoencoder": describe_start(encoder)}
    return {**facts, **told, **known_facts}


def _facts(body: str, patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The lines of "How it was made" that have the form and the order that this package gives them."""
    place = 0
    for line in _section(body, "## How it was made").splitlines():
        for index in range(place, len(patterns)):
            if re.fullmatch(f"- {patterns[index]}", line, re.ASCII):
                place = index
                name, _, value = line.removeprefix("- ").partition(": ")
                yield name, value
                break


def _metrics(model_index: Any, dataset_id: str) -> list[dict[str, Any]]:
    """Measured numbers, from the metadata; those in a form that this package does not write are left out."""
    try:
        rows = [(row["type"], row["name"], row["value"]) for row in model_index[0]["results"][0]["metrics"]]
    except (TypeError, KeyError, IndexError):
        return []
    split = re.escape(dataset_id.rpartition("/")[2]) + r" \([\w.:%+\[\]-]{1,40}\)"
    measured = re.compile("|".join(form.format(split) for form in _MEASURED), re.ASCII)
    found = []
    for kind, name, value in rows:
        data = str(name).removeprefix(f"{kind}: ")
        if re.fullmatch(_METRIC, str(kind)) and measured.fullmatch(data) and isinstance(value, float):
            found.append({"name": kind, "value": value, "data": data})
    return found


def _rows_of_files(body: str) -> dict[str, str]:
    rows = re.findall(r"^- `([\w./-]+)`: `([0-9a-f]{64})`$", _section(body, "## Files"), re.MULTILINE | re.ASCII)
    return dict(rows)


def _section(body: str, heading: str) -> str:
    """Text below a heading, up to the next one."""
    _, _, rest = body.partition(f"\n{heading}\n")
    return rest.partition("\n## ")[0]


def _first(pattern: str, body: str) -> str:
    """The group of the first line that has this form."""
    match = re.search(f"^{pattern}$", body, re.MULTILINE)
    return match[1] if match else ""


# --- what differs --------------------------------------------------------------------------------------------------


def _first_difference(body: str, expected: str, *, first_line: int) -> str:
    """The first lines that the report does not say; where there are none, the first that is missing."""
    found, wanted = body.split("\n"), expected.split("\n")
    same_start = next((i for i, (ours, theirs) in enumerate(zip(found, wanted)) if ours != theirs), None)
    start = min(len(found), len(wanted)) if same_start is None else same_start
    end = 0
    while end < min(len(found), len(wanted)) - start and found[-1 - end] == wanted[-1 - end]:
        end += 1
    extra, missing = found[start : len(found) - end], wanted[start : len(wanted) - end]
    lines = [line for line in extra if line.strip()] or extra
    if lines:
        shown = "; ".join(shorten(line) for line in lines[:_MAX_SHOWN])
        return f"not from the report, from line {first_line + start}: {shown}"
    return f"line {first_line + start} is missing: {shorten(missing[0])}"


def _leaves_its_place(owners: str) -> Iterator[str]:
    """Parts of the owner's text that may change how the rest is shown, or look as if they were not the owner's."""
    for line in owners.split("\n"):
        if "<" in line or not line.replace("\t", " ").isprintable():
            yield f"HTML or invisible characters below {OWNERS_PART!r}: {shorten(line)}"
        if re.match(r" {0,3}(?:#{1,2}(?:\s|$)|=+\s*$|-+\s*$)", line):
            yield f"a heading above the third level below {OWNERS_PART!r}: {shorten(line)}"
