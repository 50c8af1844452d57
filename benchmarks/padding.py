"""Does it pay to leave padding out of the body's layers? Packed and whole rows beside transformers' own forward.

In: DistilBERT's body at a size, rows of captions of unequal length with a photo's token behind them. Out: for each
number of rows the time of a forward pass and of forward and backward, as ratios transformers / ours, so above 1 is in
our favour; medians, all timed in turn in one process.

    python -m benchmarks.padding --rows 64,512
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel

from benchmarks.train_step import hardware
from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.model import packed

LENGTHS = (8, 20)  # of captions, words and [SEP]: about those of Flickr8k; any as likely as another


def ways(body: DistilBertModel, tokens_BSH: Tensor, counts_BS: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The hidden states hidden_BSH of all tokens, three times the same where ``counts_BS``."""
    sees, at_S = counts_BS[:, None, None], torch.arange(counts_BS.shape[1], device=counts_BS.device)

    def ours(pack: bool) -> Tensor:
        return packed.hidden_states(body, tokens_BSH, counts_BS, sees, at_S, pack)

    return {
        "transformers": lambda: body(inputs_embeds=tokens_BSH, attention_mask=counts_BS).last_hidden_state,
        "packed": lambda: ours(True),
        "whole rows": lambda: ours(False),
    }


def measure(body: DistilBertModel, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each way, ``forward`` and ``step`` (forward and backward). ValueError where two ways differ."""
    parameter = next(body.parameters())
    generator = torch.Generator().manual_seed(0)
    lengths_B1 = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (rows, 1), generator=generator)
    counts_BS = torch.arange(LENGTHS[1] + 1) < lengths_B1
    counts_BS[:, -1] = True  # the photo
    tokens_BSH = torch.randn(*counts_BS.shape, body.config.dim, generator=generator).to(parameter)
    counts_BS = counts_BS.to(parameter.device)
    found = ways(body, tokens_BSH, counts_BS)
    with torch.no_grad():
        states = {name: way()[counts_BS].float() for name, way in found.items()}
    for name, state in states.items():
        off = (state - states["transformers"]).norm() / states["transformers"].norm()
        if not off < (0.02 if parameter.dtype == torch.bfloat16 else 1e-4):
            raise ValueError(f"{name}: hidden states are {off:.1e} from transformers' own; nothing was measured")
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "step": []} for name in found}
    for number in range(rounds + 2):
        for name, way in found.items():
            for kind, run in (
                ("forward", torch.no_grad()(way)),
                ("step", lambda way=way: way()[counts_BS].sum().backward()),
            ):
                started = time.perf_counter()
                run()
                if parameter.is_cuda:
                    torch.cuda.synchronize()
                if number >= 2:  # the first two warm up
                    seconds[name][kind].append(time.perf_counter() - started)
    return {name: {kind: 1e3 * statistics.median(of) for kind, of in some.items()} for name, some in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=lambda text: [int(one) for one in text.split(",")], default=[64, 512])
    parser.add_argument("--width", type=int, default=768, help="DistilBERT's is 768")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    sizes = {"dim": args.width, "n_heads": args.width // 64, "n_layers": args.layers, "hidden_dim": 4 * args.width}
    body = DistilBertModel(DistilBertConfig(vocab_size=1, dropout=0.0, attention_dropout=0.0, **sizes))
    body.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    result: dict[str, Any] = {"sizes": sizes, "hardware": hardware(device), "rows": {}}
    for rows in args.rows:
        result["rows"][rows] = found = measure(body, rows, args.rounds)
        for kind in ("forward", "step"):
            base = found["transformers"][kind]
            told = ", ".join(f"{name} {base / found[name][kind]:.2f}" for name in ("packed", "whole rows"))
            print(f"{rows} rows, {kind}: transformers {base:.2f} ms; transformers / ours: {told}")
    print(result["hardware"])
    if args.out:
        atomic_write(args.out, json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
