"""`diffcap VERB ...`: the front door. Loads only the verb that was asked for, so `diffcap --help` answers at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "demo": "the whole road in minutes: scenes, shards, a small CLIP, training on 2 ranks, scores, a report",
    "train": "train a denoiser on shards: diffcap train CONFIG key=value ...",
    "evaluate": "caption a split of a run's shards and score it",
    "caption": "caption picture files",
    "distill": "a run's captions of its training photos, to train another model on",
    "frontier": "quality against steps and captions per second, of runs of any kind: table and plot",
    "ablate": "what each change between two recipes is worth: table and plot of a sweep that ran them",
    "report": "write a run's report.html",
    "train-clip": "train a small CLIP on shards, to stand in for ViT-B/32 where no weights can be fetched",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: diffcap VERB ...   (diffcap VERB --help says more)\n")
        print("\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items()))
        return 0 if arguments else 2
    verb = arguments[0]
    if verb not in VERBS:
        print(f"diffcap: unknown verb {verb!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"diffcap_dist.{verb.replace('-', '_')}")
    try:
        return int(module.main(arguments[1:]))
    except (
        ValueError,
        OSError,
    ) as error:  # what the user can mend; anything else is ours and keeps its traceback
        print(f"diffcap {verb}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
