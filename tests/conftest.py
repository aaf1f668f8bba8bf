"""Shared fixtures.  Everything is real: real PEFT, real TRL, a real vLLM engine in this process, tiny models."""

from __future__ import annotations

import gc
import os

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # cores of its own: engines bind their threads to those they see
    cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: count])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rollout_server import RolloutServer

if TYPE_CHECKING:
    from fura_rl.sync.weight_sync import SyncReport, WeightSync

REPOSITORY = Path(__file__).resolve().parent.parent

# One tolerance per dtype: the largest relative error of a weight or an output that rounding explains here.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PARITY_NATS = 1e-5  # engine against trainer, float32


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_inherited_rank() -> Iterator[None]:
    """A trainer in this process leaves its rank and its port in the environment; a script started later would take
    itself for a process of that run."""
    forget_rank()
    yield
    forget_rank()


def forget_rank() -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def make_tiny_checkpoint(
    folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object
) -> Path:
    """A random Qwen3 of the quickstart's architecture, narrower, with outputs peaked enough to notice a change."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from fura_rl.quickstart import BASE_MODEL

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    config = Qwen3Config.from_pretrained(BASE_MODEL)
    config.tie_word_embeddings = tied
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32} | overrides
    for name, value in settings.items():
        setattr(config, name, value)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4.0)
        if tied:  # the head is the embedding, so its logits are peaked through the last norm
            model.model.norm.weight.mul_(4.0)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_random_checkpoint(folder: Path, family: str, noise: float = 0.1, **overrides: object) -> Path:
    """A random model of any family of transformers (its `model_type`), biases and norms moved too."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    from fura_rl.quickstart import BASE_MODEL

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    size = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings | special | size | overrides))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_moe_checkpoint(folder: Path) -> Path:
    """Two layers of eight experts; transformers holds them stacked, the checkpoint one by one."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from fura_rl.quickstart import BASE_MODEL

    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=False, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_pythia_checkpoint(folder: Path) -> Path:
    """Its q, k and v lie head by head, and its output head has another name than in transformers."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    return make_random_checkpoint(folder, "gpt_neox", noise=0.06, **sizes)


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def bfloat16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("bfloat16"), tied=True, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def rollout_server(untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutServer]:
    """One real server of the untied checkpoint for all slow tests: its start is what costs."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    server = RolloutServer(untied_checkpoint, log, "--enable-prompt-tokens-details").start()
    try:
        yield server.wait_until_up()
    finally:
        server.stop()


ENGINES = []  # kept to the end of a file: one that is collected takes the process's parallel state down under the next


@pytest.fixture(autouse=True, scope="module")
def _no_inherited_engine() -> Iterator[None]:
    """Engines end with the file that started them, and so does their process group, which a trainer made later in this
    process would take for its own."""
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)  # a second for each of them, and once does
        while ENGINES:
            ENGINES.pop().llm_engine.engine_core.shutdown()
    gc.collect()


def start_llm(folder: Path, dtype: str = "float32", **options: object) -> Any:
    """A small `vllm.LLM` of this process."""
    from vllm import LLM

    settings = {"enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20, "max_model_len": 128}
    ENGINES.append(LLM(str(folder), dtype=dtype, disable_log_stats=True, **settings | options))
    return ENGINES[-1]


def forget_cut_engines() -> None:
    """Drop what a run that was killed has left of an engine cut up between its processes: vLLM's CPU engines name their
    shared memory alike, and a second one of that name is not made."""
    for left in Path("/dev/shm").glob("-tp:*"):
        left.unlink()


def leave_weights_unpacked(patch: pytest.MonkeyPatch) -> None:
    """Have CPU engines that start from here on keep their weights as a checkpoint lays them out."""
    patch.setattr("vllm._custom_ops._supports_onednn", False)
    # small weights of 16 bits, on a processor with matrix tiles (AMX)
    patch.setattr("vllm.model_executor.layers.utils.check_cpu_sgl_kernel", lambda *shape_and_dtype: False)


@contextmanager
def one_trainer_engine() -> Iterator[None]:
    """Every `FuraGRPOTrainer` made in here gets the engine that the first one started."""
    from fura_rl.trainer import FuraGRPOTrainer

    started, make = [], FuraGRPOTrainer._make_engine

    def shared(self: FuraGRPOTrainer, **kwargs: Any) -> Any:
        if not started:
            started.append(make(self, **kwargs))
        return started[0]

    FuraGRPOTrainer._make_engine = shared
    try:
        yield
    finally:
        FuraGRPOTrainer._make_engine = make


@torch.no_grad()
def perturb_trained(model: torch.nn.Module, scale: float, seed: int) -> None:
    """Move every trained parameter by a seeded random step of relative size `scale`: one optimizer step's stand-in."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            size = parameter.abs().mean().clamp_min(0.02)
            parameter.add_(scale * size * torch.randn(parameter.shape, generator=generator).to(parameter))


def check_that_two_updates_arrive(sync: WeightSync, scale: float, *, everything: bool = False) -> list[SyncReport]:
    """Twice an optimizer step's stand-in and a sync, of which the engine must move where the policy does.

    `sync` probes every sync; with `everything` the first sends unadapted weights too.  Returns their reports.
    """
    reports = []
    for step in range(2):
        before = sync.engine.prompt_logprobs(sync.proof.token_ids)
        perturb_trained(sync.model, scale, seed=step)
        reports.append(sync.sync(everything=everything and step == 0))
        assert reports[-1].probe_max_gap < PARITY_NATS
        moved = (sync.engine.prompt_logprobs(sync.proof.token_ids) - before).abs().max()
        assert moved > 100 * PARITY_NATS, "it must move"
    return reports
