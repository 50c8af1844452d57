"""`diffcap train CONFIG key=value ...`: train a denoiser, on one process or on the ranks a launcher made.

In: a config and shards. Out: a run directory with metrics, checkpoints and exported weights. The same command again
continues the run. `deepspeed --module diffcap_dist.train CONFIG` and `torchrun -m diffcap_dist.train CONFIG` run the
same function.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffcap_dist.config import Config, load_config
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.stream import Batch, CaptionStream, ShardReader, all_records
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws
from diffcap_dist.evaluation.captioner import Captioner, export_weights, load_tokenizer
from diffcap_dist.evaluation.validation import Validation
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import checkpoint, distributed
from diffcap_dist.training.checkpoint import TrainState
from diffcap_dist.training.distributed import Ranks
from diffcap_dist.training.ema import EMA
from diffcap_dist.training.engine import (
    BatchSplit,
    build_engine,
    choose_precision,
    full_state,
    set_learning_rate,
    split_batch,
)
from diffcap_dist.training.learning_rate import learning_rate
from diffcap_dist.training.preemption import StopFlag

log = logging.getLogger("diffcap")
