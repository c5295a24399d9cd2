"""`dp-curriculum train`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size
from diffusers.utils import logging

from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.last_words import say_last
from dp_curriculum.runtime.processes import check_launch, from_main, process_state
from dp_curriculum.runtime.trackers import check_tracker
from dp_curriculum.sharing.hub import HubError, check_token, make_repository, push_to_hub
from dp_curriculum.training.curriculum import CurriculumResult, run_curriculum


logging.disable_progress_bar()  # of loading two components


INTERRUPTED = 130


def main(args: Sequence[str]) -> int:
    """Trains from easy to hard under one budget, and writes pipeline, sample sheet, privacy report and card."""
    parser = config_parser("train", main.__doc__)
    parser.add_argument("--output_dir", required=True, help="A new or empty folder.")
    parser.add_argument(
        "--resume_from_checkpoint",
        metavar="latest|PATH",
        help="latest: resume the run in --output_dir from its latest checkpoint, or start one if there is none. PATH: "
        "resume from this checkpoint and remove later ones. Their cost stays charged.",
    )
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the run in --output_dir.")
    check_launch()
    given, config = parse_config(parser, args)
    check_tracker(config.runtime.report_to)  # before a repository is made
    repo_id = config.runtime.hub_model_id or Path(given.output_dir).resolve().name
    if config.runtime.push_to_hub:
        repo_id = _prepare_push(repo_id, config)
    try:
        result = run_curriculum(
            config,
            output_dir=given.output_dir,
            resume_from_checkpoint=given.resume_from_checkpoint,
            overwrite_output_dir=given.overwrite_output_dir,
        )
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise MemoryError(
            f"memory ran out at --max_physical_batch_size={config.runtime.max_physical_batch_size or 'unset'}: add "
            "--resume_from_checkpoint latest and a smaller one, which changes no result"
        ) from None
    if process_state().is_main_process:
        words = _format_result(result, Path(given.output_dir))
        if not result.finished:
            say_last(words)
            return INTERRUPTED
        print(words)
        if config.runtime.push_to_hub:
            return _push(given.output_dir, repo_id, config)
    return 0 if result.finished else INTERRUPTED  # of the other processes


def _prepare_push(repo_id: str, config: CurriculumConfig) -> str:
    """Finds out before training whether the push can be made afterwards; makes the repository."""
    if config.privacy.non_private:
        raise ValueError(
            "Refusing to push a model of --non_private: it is for comparison only. Leave out --push_to_hub."
        )

    def make() -> str:
        full_id = check_token(repo_id)
        make_repository(full_id, private=not config.runtime.public)
        return full_id

    return from_main(process_state(), make)


def _push(output_dir: str, repo_id: str, config: CurriculumConfig) -> int:
    """Pushes; a failure leaves the result where it is."""
    try:
        print(f"  pushed to     {push_to_hub(output_dir, repo_id, private=not config.runtime.public)}")
    except (HubError, ValueError) as error:
        again = f"dp-curriculum push {output_dir} --repo_id {repo_id}{' --public' if config.runtime.public else ''}"
        raise HubError(f"{error} The result is in {output_dir}; push it with: {again}") from None
    return 0


def _format_result(result: CurriculumResult, output_dir: Path) -> str:
    ending = "finished" if result.finished else "interrupted: the pipeline trained so far is usable"
    folder = shlex.quote(str(output_dir))
    following = (
        f"dp-curriculum sample {folder} --num_images 64 --output_dir samples"
        if result.finished
        else f"dp-curriculum train --config {shlex.quote(str(RunFolder(output_dir).config))} --output_dir {folder} "
        "--resume_from_checkpoint latest"
    )
    return (
        f"{ending}\n  pipeline      {output_dir}\n  sample sheet  {output_dir / 'samples.png'}\n"
        f"  card          {output_dir / 'README.md'}\n  privacy       {result.report.statement()}\n"
        f"  {'next' if result.finished else 'to resume'}{' ' * (10 if result.finished else 5)}{following}"
    )
