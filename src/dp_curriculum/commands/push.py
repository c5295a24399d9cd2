"""`dp-curriculum push`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dp_curriculum.commands.arguments import CommandParser, add_dataset_ledger_argument
from dp_curriculum.sharing.export import export_release, held_parts, model_files
from dp_curriculum.sharing.hub import push_to_hub


def main(args: Sequence[str]) -> int:
    """Shares a model with its privacy report: an allow-list of files, as one commit. It spends nothing."""
    parser = CommandParser("push", main.__doc__)
    parser.add_argument("model", help="Folder of a run.")
    parser.add_argument("--repo_id", help="Repository on the Hub, such as org/model. Created if needed.")
    parser.add_argument("--export_dir", help="New folder for the shared files. Without --repo_id, nothing is sent.")
    parser.add_argument(
        "--public", action="store_true", help="Make a new repository public. It is private by default."
    )
    parser.add_argument("--license", help="Licence of the weights, by its name on the Hub, such as apache-2.0.")
    parser.add_argument(
        "--allow_non_private", action="store_true", help="Share a run without a guarantee, stamped NOT PRIVATE."
    )
    add_dataset_ledger_argument(parser)
    given = parser.parse_args(args)
    if given.repo_id is None and given.export_dir is None:
        raise ValueError("Expected --repo_id or --export_dir to be given: nothing would be written or sent.")
    options = {name: getattr(given, name) for name in ("license", "allow_non_private", "dataset_ledger")}
    if given.export_dir is not None:
        export_release(given.model, given.export_dir, repo_id=given.repo_id, **options)
        print(f"{len(model_files(held_parts(Path(given.export_dir))))} files in {given.export_dir}")
    if given.repo_id is not None:
        print(push_to_hub(given.model, given.repo_id, private=not given.public, **options))
    return 0
