"""`dp-curriculum train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.curriculum import CurriculumResult, run_curriculum


INTERRUPTED = 130


def main(args: Sequence[str]) -> int:
    """Trains from easy to hard under one budget, and writes pipeline, sample sheet, privacy report and card."""
    parser = config_parser("train", main.__doc__)
    parser.add_argument("--output_dir", required=True, help="A new or empty folder.")
    parser.add_argument("--resume", action="store_true", help="Go on with the run that is in --output_dir.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the run that is in --output_dir.")
    given, config = parse_config(parser, args)
    result = run_curriculum(
        config, output_dir=given.output_dir, resume=given.resume, overwrite_output_dir=given.overwrite_output_dir
    )
    if PartialState().is_main_process:
        print(_format_result(result, Path(given.output_dir)))
    return 0 if result.finished else INTERRUPTED


def _format_result(result: CurriculumResult, output_dir: Path) -> str:
    ending = "finished" if result.finished else "interrupted: --resume goes on; what is there can be used"
    return (
        f"{ending}\n  pipeline      {output_dir}\n  sample sheet  {output_dir / 'samples.png'}\n"
        f"  card          {output_dir / 'README.md'}\n  privacy       {result.report.statement()}"
    )
