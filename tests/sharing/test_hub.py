"""Pushing to a Hub and fetching from it, with the real client over HTTP: one commit, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hub_server
import pytest
from hub_server import Hub, Repository
from huggingface_hub import constants

import dp_curriculum
from dp_curriculum.sharing import hub as client
from dp_curriculum.sharing.export import MODEL_FILES, ExportRefused
from dp_curriculum.sharing.hub import (
    HubError,
    check_token,
    commit_folder,
    fetch_published,
    make_repository,
    push_to_hub,
)


COMMIT = r"POST .*/commit/"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run-of-patients"))


def repository(hub: Hub) -> Repository:
    return hub.repositories[("model", "org/faces")]


def pushed_files(hub: Hub) -> dict[str, bytes]:
    return {name: content for name, content in repository(hub).files.items() if name != ".gitattributes"}


def commits(hub: Hub) -> int:
    """Commits after the one that made the repository."""
    return len(repository(hub).commits) - 1


# --- what is pushed ------------------------------------------------------------------------------------------------


def test_what_is_uploaded_is_the_allow_list_in_one_commit_whatever_lies_about(hub: Hub, run: Path) -> None:
    secret = b"patient 7"
    for name in ("secret.txt", "unet/thumbnail_private.png", "checkpoint.pkl", "logs.txt", "scheduler/notes.json"):
        (run / name).write_bytes(secret)
    assert push_to_hub(run, "org/faces") == f"{hub.url}/org/faces"
    assert set(pushed_files(hub)) == set(MODEL_FILES) and commits(hub) == 1
    sent = b"".join(pushed_files(hub).values())
    assert secret not in sent and str(run).encode() not in sent and b"run-of-patients" not in sent
    assert repository(hub).private


def test_the_package_exports_the_function(hub: Hub, run: Path) -> None:
    assert dp_curriculum.push_to_hub is push_to_hub and "push_to_hub" in dp_curriculum.__all__


def test_an_unchanged_export_makes_no_commit_and_a_changed_one_does(hub: Hub, run: Path) -> None:
    push_to_hub(run, "org/faces")
    push_to_hub(run, "org/faces")
    assert commits(hub) == 1
    push_to_hub(run, "org/faces", license="mit")
    assert commits(hub) == 2 and b"license: mit" in pushed_files(hub)["README.md"]


def test_an_older_card_and_older_weights_do_not_stay(hub: Hub, run: Path) -> None:
    stale = {"README.md": b"---\nlicense: mit\n---\nold", "unet/diffusion_pytorch_model.bin": b"\x80\x02}q\x00."}
    hub.put("org/faces", {**stale, "notes.md": b"a person's own"})
    push_to_hub(run, "org/faces")
    assert set(pushed_files(hub)) == {*MODEL_FILES, "notes.md"} and commits(hub) == 1
    assert b"old" not in pushed_files(hub)["README.md"].splitlines()


def test_a_name_without_namespace_is_the_users_own_and_the_card_says_so(hub: Hub, run: Path) -> None:
    push_to_hub(run, "faces", private=False)
    made = hub.repositories[("model", "alice/faces")]
    assert b'from_pretrained("alice/faces")' in made.files["README.md"] and not made.private


def test_a_repository_that_is_public_already_is_pointed_out(
    hub: Hub, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put("org/faces", {".gitattributes": b""})
    push_to_hub(run, "org/faces")
    assert "already exists and is public" in caplog.text and commits(hub) == 1


def test_a_run_that_is_not_private_sends_nothing(hub: Hub, run: Path) -> None:
    (run / "run" / "privacy_ledger.jsonl").unlink()
    with pytest.raises(ExportRefused, match="its ledger is missing"):
        push_to_hub(run, "org/faces")
    assert not hub.repositories and hub.requests == ["GET /api/whoami-v2"]
    push_to_hub(run, "org/faces", allow_non_private=True)
    assert b"NOT PRIVATE" in pushed_files(hub)["README.md"]


# --- who may push --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "Log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", "Log in with `hf auth login`, or set HF_TOKEN"),
        (hub_server.READ_TOKEN, "the token may only read"),
        (hub_server.OTHER_TOKEN, "mallory may write to mallory"),
    ],
    ids=["none", "unknown", "read", "of somebody else"],
)
def test_a_token_that_may_not_write_is_found_before_anything_is_sent(
    token: str | None, message: str, hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match="Refusing to push to org/faces") as caught:
        push_to_hub(run, "org/faces")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(token) not in str(caught.value) and not hub.repositories


def test_a_token_that_is_given_goes_before_that_of_the_machine(hub: Hub) -> None:
    with pytest.raises(ValueError, match="mallory may write to mallory"):
        check_token("org/faces", token=hub_server.OTHER_TOKEN)
    assert check_token("faces") == "alice/faces" and check_token("org/faces") == "org/faces"


def test_a_name_that_is_no_id_is_refused(hub: Hub) -> None:
    with pytest.raises(ValueError, match="Expected --repo_id=a/b/c to be a Hub id"):
        check_token("a/b/c")
    assert not hub.requests


def test_a_hub_that_forbids_the_repository_is_told_apart_from_one_that_fails(hub: Hub) -> None:
    hub.fail("POST /api/repos/create", 403)
    with pytest.raises(ValueError, match="Refusing to push to org/faces: .*. Use another token"):
        make_repository("org/faces")


# --- a network that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        *[(COMMIT, kind) for kind in (409, 412, 429, 500, 502, 503, 504, "drop")],
        *[(request, kind) for request in ("GET /api/whoami-v2", "GET /api/models/") for kind in (409, 503, "drop")],
        ("POST .*/preupload/", 503),
    ],
)
def test_a_failure_that_passes_is_tried_again(request_: str, kind: int | str, hub: Hub, run: Path) -> None:
    hub.fail(request_, kind)
    push_to_hub(run, "org/faces")
    assert set(pushed_files(hub)) == set(MODEL_FILES) and commits(hub) == 1


def test_a_failure_to_make_the_repository_is_tried_again(hub: Hub, run: Path) -> None:
    hub.fail("POST /api/repos/create", 503)
    push_to_hub(run, "org/faces")
    assert commits(hub) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, run: Path) -> None:
    hub.fail(COMMIT, "lose")
    push_to_hub(run, "org/faces")
    assert commits(hub) == 1


@pytest.mark.parametrize("kind", [409, 503, "drop"])
def test_a_network_that_stays_lost_leaves_no_commit_and_the_next_push_succeeds(
    kind: int | str, hub: Hub, run: Path
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    hub.fail(COMMIT, kind, times=99)
    with pytest.raises(HubError, match="the Hub could not be used") as caught:
        push_to_hub(run, "org/faces")
    assert "\n" not in str(caught.value) and commits(hub) == 0 and not pushed_files(hub)
    assert sum("/commit/" in request for request in hub.requests) == len(client.WAITS) + 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    hub.faults.clear()
    push_to_hub(run, "org/faces")
    assert set(pushed_files(hub)) == set(MODEL_FILES) and commits(hub) == 1


def test_a_machine_that_is_offline_on_purpose_does_not_try_again(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is enabled"):
        push_to_hub(run, "org/faces")
    assert "Trying again" not in caplog.text and not hub.requests


def test_a_commit_of_somebody_else_in_between_is_seen(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another commit lands between the look at the repository and ours: ours is made on top of it."""
    make_repository("org/faces")
    preupload = client.HfApi.preupload_lfs_files

    def late(*arguments: object, **options: object) -> None:
        preupload(*arguments, **options)  # type: ignore[arg-type]
        if commits(hub) == 0:
            repository(hub).add({**repository(hub).files, "notes.md": b"theirs"})

    monkeypatch.setattr(client.HfApi, "preupload_lfs_files", late)
    push_to_hub(run, "org/faces")
    assert set(pushed_files(hub)) == {*MODEL_FILES, "notes.md"} and commits(hub) == 2


def test_a_card_that_the_hub_does_not_accept_is_refused_in_one_line(hub: Hub, run: Path) -> None:
    with pytest.raises(ValueError, match="Expected the card to be valid: .*license") as caught:
        push_to_hub(run, "org/faces", license="My Own")
    assert "\n" not in str(caught.value) and commits(hub) == 0


# --- what is fetched -----------------------------------------------------------------------------------------------


def test_files_of_known_names_are_fetched_and_no_other(hub: Hub) -> None:
    names = {"privacy.json": b"{}", "../../evil.json": b"{}", "/etc/evil.json": b"{}", "unet/model.bin": b"\x80"}
    hub.put("org/faces", names)
    found, listed = fetch_published("org/faces", ("privacy.json", "README.md"))
    assert set(found) == {"privacy.json"} and json.loads(found["privacy.json"].read_text()) == {}
    assert set(listed) == set(names)
    assert [request for request in hub.requests if "resolve" in request and "privacy.json" not in request] == []


def test_a_file_that_is_too_large_is_not_downloaded(hub: Hub) -> None:
    hub.put("org/faces", {"privacy.json": b"{}"})
    hub.sizes["privacy.json"] = 5 * 2**30
    with pytest.raises(ValueError, match=r"Expected privacy.json of org/faces to have at most [\d,]+ bytes"):
        fetch_published("org/faces", ["privacy.json"])
    assert not any("resolve" in request for request in hub.requests)


def test_an_older_revision_can_be_fetched(hub: Hub) -> None:
    made = hub.put("org/faces", {"privacy.json": b"1"})
    made.add({"privacy.json": b"2"})
    for revision, content in ((None, b"2"), (made.commits[0][0], b"1")):
        found, _ = fetch_published("org/faces", ["privacy.json"], revision=revision)
        assert found["privacy.json"].read_bytes() == content


def test_what_is_not_there_is_said_in_one_line(hub: Hub) -> None:
    with pytest.raises(ValueError, match="Expected org/faces to be a folder, or a model on the Hub") as caught:
        fetch_published("org/faces", ["privacy.json"])
    assert "\n" not in str(caught.value)
    hub.put("org/faces", {"privacy.json": b"1"})
    with pytest.raises(ValueError, match="Expected org/faces to be"):
        fetch_published("org/faces", ["privacy.json"], revision="v9")


def test_a_folder_goes_into_a_dataset_repository_as_well(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    names = ["README.md", "data/train-00000-of-00001.parquet"]
    make_repository("org/numbers", repo_type="dataset")
    done = commit_folder(tmp_path, "org/numbers", names, repo_type="dataset")
    assert done.changed and done.url == f"{hub.url}/datasets/org/numbers"
    assert set(hub.repositories[("dataset", "org/numbers")].files) == {*names, ".gitattributes"}
    assert not commit_folder(tmp_path, "org/numbers", names, repo_type="dataset").changed
