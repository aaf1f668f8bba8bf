"""A long run on paper: memory of every GPU, bytes of every sync, where the time of a step goes.  Pure arithmetic.

    python -m fura_rl.scale                                            70B on 8 nodes of 8 GPUs
    python -m fura_rl.scale --model 7b --trainer_nodes 1 --rollout_nodes 1 --sharding ddp --adapter lora --rank 64

Counts (parameters, trained tensors, payload) are exact for Llama, Qwen2 and Qwen3 and are tested against the models
themselves.  Times are a roofline: work over peak, with the efficiencies below, which are assumptions, not
measurements; so is what activations take.  They say what dominates, not what a machine will show.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fura_rl.adapters.blocks import default_block_size
from fura_rl.benchmark.models import SIZES, decoder_projections

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2  # bytes
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
ADAPTERS = ("fura", "lora", "full")


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama family."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    head_norms: bool = False  # Qwen3 normalises queries and keys
    qkv_bias: bool = False  # Qwen2 has it

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Model:
        """The shape of a Llama, Qwen2 or Qwen3 by its config.

        Raises:
            ValueError: for another architecture, whose parameters this file cannot count.
        """
        if config.model_type not in ("llama", "qwen2", "qwen3"):
            raise ValueError(f"model_type={config.model_type!r} is not one of llama, qwen2, qwen3")
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            head_norms=config.model_type == "qwen3",
            qkv_bias=config.model_type == "qwen2",
        )

    @classmethod
    def sized(cls, size: str, **rest: bool) -> Model:
        """The shape of a size that the benchmarks know too."""
        s = SIZES[size]
        return cls(
            s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"], s["num_attention_heads"],
            s["num_key_value_heads"], s["head_dim"], s["vocab_size"], **rest,
        )  # fmt: skip

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of a layer's q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return decoder_projections(self.hidden, self.intermediate, queries, keys)

    @property
    def linear_parameters(self) -> int:
        """Of all projections, which are what the adapters adapt."""
        return self.layers * sum(rows * columns for rows, columns in self.projections)

    @property
    def parameters(self) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return embeddings + self.linear_parameters + self.layers * (norms + biases) + self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * BFLOAT16


MODELS = {
    "0.6b": Model.sized("qwen3-0.6b", tied=True, head_norms=True),
    "1.7b": Model.sized("qwen3-1.7b", tied=True, head_norms=True),
    "7b": Model.sized("7b", qkv_bias=True),
    "32b": Model(5120, 25600, 64, 64, 8, 128, 151936, head_norms=True),
    "70b": Model(8192, 28672, 80, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Adapter:
    """What a method trains, keeps frozen beside the base, and sends."""

    trained: int
    frozen: int  # numbers in float32 that no sharding cuts up, since they are buffers
    payload: int  # numbers of a sync
    payload_itemsize: int


def adapter_of(model: Model, name: str, rank: int, engine_itemsize: int = BFLOAT16) -> Adapter:
    """FuRA with its defaults, LoRA of a rank, or full fine-tuning, on all projections.

    Raises:
        ValueError: for another name.
    """
    if name == "full":
        return Adapter(model.parameters, 0, model.parameters, engine_itemsize)
    if name == "lora":
        size = model.layers * sum(rank * (rows + columns) for rows, columns in model.projections)
        return Adapter(size, 0, size, engine_itemsize)
    if name == "fura":
        blocks = [(columns, default_block_size(columns, rows)) for rows, columns in model.projections]
        core = model.layers * sum(columns * (size + 1) for columns, size in blocks)  # one block matrix and its values
        return Adapter(core, core, model.layers * sum(columns * size for columns, size in blocks), engine_itemsize)
    raise ValueError(f"adapter={name!r} is not one of {', '.join(ADAPTERS)}")


@dataclass(frozen=True)
class Hardware:
    """An H100 node with 400 Gbit/s a GPU, and the shares of its peaks that a run is assumed to reach."""

    gpu_gib: float = 80.0
    flops: float = 989e12  # bfloat16, dense
    memory_bandwidth: float = 3.35e12  # bytes/s
    network_bandwidth: float = 50e9  # bytes/s of a GPU between nodes
    train_efficiency: float = 0.35  # of flops
    decode_efficiency: float = 0.5  # of memory bandwidth
    network_efficiency: float = 0.6


@dataclass(frozen=True)
class Plan:
    """One run: its machines, and one GRPO step of it."""

    trainer_nodes: int = 4
    rollout_nodes: int = 4
    gpus: int = 8  # of a node
    adapter: str = "fura"
    rank: int = 64  # of LoRA
    sharding: str = "fsdp2"
    tensor_parallel: int = 8
    prompts: int = 128
    num_generations: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 4096  # mean
    micro_batch: int = 1  # sequences of one forward on a GPU
    memory_utilization: float = 0.9  # of the rollout engine

    @property
    def trainers(self) -> int:
        return self.trainer_nodes * self.gpus

    @property
    def replicas(self) -> int:
        return self.rollout_nodes * self.gpus // self.tensor_parallel

    @property
    def sequences(self) -> int:
        return self.prompts * self.num_generations

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def check(plan: Plan) -> None:
    """Raises ValueError with everything that does not fit together."""
    faults = [
        f"{name}={value} must be 1 or more"
        for name, value in vars(plan).items()
        if isinstance(value, int | float) and value <= 0
    ]
    for name, valid in (("sharding", SHARDINGS), ("adapter", ADAPTERS)):
        if getattr(plan, name) not in valid:
            faults.append(f"{name}={getattr(plan, name)!r} is not one of {', '.join(valid)}")
    if not faults and plan.rollout_nodes * plan.gpus % plan.tensor_parallel:
        faults.append(
            f"tensor_parallel={plan.tensor_parallel} does not divide the {plan.rollout_nodes * plan.gpus} rollout GPUs"
        )
    if not faults and plan.sequences % plan.trainers:
        faults.append(
            f"{plan.sequences} completions (prompts x num_generations) do not divide over {plan.trainers} trainer GPUs"
        )
    if faults:
        raise ValueError("; ".join(faults))


def trainer_bytes(model: Model, plan: Plan) -> dict[str, float]:
    """Bytes on each trainer GPU, by what they are.  The last two are estimates."""
    adapter = adapter_of(model, plan.adapter, plan.rank)
    shards = {"ddp": (1, 1), "zero2": (1, plan.trainers)}.get(plan.sharding, (plan.trainers, plan.trainers))
    of_weights, of_states = shards
    base = 0 if plan.adapter == "full" else model.parameters * BFLOAT16
    sharded_weights = of_weights > 1
    largest = max(sum(r * c for r, c in model.projections), model.vocab * model.hidden)
    tokens = plan.micro_batch * plan.sequence_tokens
    per_token = model.hidden * model.layers + 4 * model.hidden + 3 * model.intermediate  # checkpoints, one layer's own
    logits = plan.micro_batch * plan.completion_tokens * model.vocab * (BFLOAT16 + FLOAT32)
    return {
        "base weights": base / of_weights,
        "trained weights": adapter.trained * FLOAT32 / of_weights,
        "frozen bases of the adapter": float(adapter.frozen * FLOAT32),
        "gradients": adapter.trained * FLOAT32 / of_states,
        "Adam's moments": 2 * adapter.trained * FLOAT32 / of_states,
        "gathered layers (estimate)": 2.0 * largest * BFLOAT16 if sharded_weights else 0.0,
        "activations and logits (estimate)": float(tokens * per_token * BFLOAT16 + logits),
    }


def engine_bytes(model: Model, plan: Plan, hardware: Hardware) -> dict[str, float]:
    """Bytes on each rollout GPU; what the weights leave is keys and values."""
    weights = model.parameters * BFLOAT16 / plan.tensor_parallel
    pristine = 0 if plan.adapter == "full" else model.linear_parameters * BFLOAT16 / plan.tensor_parallel
    cache = hardware.gpu_gib * GIB * plan.memory_utilization - weights
    return {"weights": weights, "keys and values": cache, "base to fold from (page cache)": pristine}


def sync_bytes(model: Model, plan: Plan) -> dict[str, float]:
    """What one sync moves."""
    adapter = adapter_of(model, plan.adapter, plan.rank)
    payload = adapter.payload * adapter.payload_itemsize
    return {
        "payload to one server": float(payload),
        "payload to all servers": float(payload * plan.replicas),
        "gathered in the trainer": float(adapter.trained * FLOAT32) if plan.sharding in ("fsdp2", "zero3") else 0.0,
        "a sync of every weight, to one server": float(model.parameters * BFLOAT16),
    }


def step_seconds(model: Model, plan: Plan, hardware: Hardware) -> dict[str, float]:
    """Seconds of a step's phases, one after another."""
    adapter = adapter_of(model, plan.adapter, plan.rank)
    tokens = plan.sequences * plan.sequence_tokens
    network = hardware.network_bandwidth * hardware.network_efficiency

    # decoding reads the weights once and every sequence's cache for each token of the longest half-filled sequence
    cache_room = engine_bytes(model, plan, hardware)["keys and values"] * plan.tensor_parallel
    each_cache = (plan.prompt_tokens + plan.completion_tokens / 2) * model.kv_bytes_per_token
    wanted = plan.sequences / plan.replicas
    running = max(1.0, min(wanted, cache_room / each_cache))
    read = (model.parameters * BFLOAT16 + running * each_cache) / plan.tensor_parallel
    token_seconds = max(
        read / (hardware.memory_bandwidth * hardware.decode_efficiency),
        2 * model.parameters * running / (plan.tensor_parallel * hardware.flops * hardware.train_efficiency),
    )
    rollout = token_seconds * plan.completion_tokens * (wanted / running)

    # log-probs of the sampler's policy, forward, its repetition for checkpointing, gradient of inputs [and of weights]
    passes = 4 if plan.adapter != "full" else 5
    peak = plan.trainers * hardware.flops * hardware.train_efficiency
    compute = 2 * passes * model.parameters * tokens / peak
    micro_steps = plan.sequences / (plan.trainers * plan.micro_batch)
    gathers = 3 * micro_steps * model.parameters * BFLOAT16 / network if plan.sharding in ("fsdp2", "zero3") else 0.0
    reduced = 2 * adapter.trained * FLOAT32 / network

    moved = sync_bytes(model, plan)
    send = moved["payload to all servers"] / network + moved["gathered in the trainer"] / network
    fold_bytes = 3 * model.linear_parameters * BFLOAT16 / plan.tensor_parallel
    fold = fold_bytes / (hardware.memory_bandwidth * hardware.decode_efficiency)
    return {
        "rollouts": rollout,
        "training: arithmetic": compute,
        "training: gathering layers": gathers,
        "training: reducing gradients": reduced,
        "sync: sending": send,
        "sync: folding": fold,
    }


def table(model: Model, plan: Plan, hardware: Hardware) -> str:
    adapter = adapter_of(model, plan.adapter, plan.rank)
    trainer = trainer_bytes(model, plan)
    engine = engine_bytes(model, plan, hardware)
    on_gpu = {name: size for name, size in engine.items() if "page cache" not in name}
    seconds = step_seconds(model, plan, hardware)
    total = sum(seconds.values())
    lines = [
        f"{model.parameters / 1e9:.2f} billion parameters, {adapter.trained / 1e6:,.1f} million trained "
        f"({adapter.trained / model.parameters:.2%}) with {plan.adapter}",
        f"{plan.trainer_nodes} x {plan.gpus} GPUs train ({plan.sharding}), {plan.rollout_nodes} x {plan.gpus} sample: "
        f"{plan.replicas} servers of {plan.tensor_parallel}",
        f"a step: {plan.prompts} prompts x {plan.num_generations} completions of {plan.completion_tokens} tokens",
        *section("GiB on a trainer GPU", {name: size / GIB for name, size in trainer.items()}, "{:.2f}"),
        *verdict("trainer", sum(trainer.values()) / GIB, hardware.gpu_gib),
        *section("GiB on a rollout GPU", {name: size / GIB for name, size in engine.items()}, "{:.2f}"),
        *verdict("rollout", (sum(on_gpu.values()) if engine["keys and values"] > 0 else engine["weights"]) / GIB,
                 hardware.gpu_gib * plan.memory_utilization),
        *section("GB of a sync", {name: size / 1e9 for name, size in sync_bytes(model, plan).items()}, "{:.3f}"),
        *section("seconds of a step (roofline)", seconds, "{:.1f}"),
        f"  {'in all':<42}{total:>10.1f}",
        *section("share of the step", {name: 100 * value / total for name, value in seconds.items()}, "{:.1f}%"),
    ]  # fmt: skip
    return "\n".join(lines)


def section(title: str, values: dict[str, float], number: str) -> list[str]:
    return ["", title, *(f"  {name:<42}{number.format(value):>10}" for name, value in values.items())]


def verdict(kind: str, used_gib: float, has_gib: float) -> list[str]:
    fits = "fits" if used_gib <= has_gib + 1e-9 else f"does not fit a {kind} GPU"
    return [f"  {'in all, of ' + format(has_gib, '.0f') + ': ' + fits:<42}{used_gib:>10.2f}"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="70b", help=f"{', '.join(MODELS)}, or a checkpoint folder or hub id [70b]")
    for field in dataclasses.fields(Plan):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"[{field.default}]")
    parser.add_argument("--gpu_gib", type=float, default=Hardware.gpu_gib, help="memory of a GPU [80]")
    given = vars(parser.parse_args(argv))
    name, hardware = given.pop("model"), Hardware(gpu_gib=given.pop("gpu_gib"))
    plan = Plan(**given)
    try:
        check(plan)
        if (model := MODELS.get(name)) is None:
            from transformers import AutoConfig

            model = Model.of(AutoConfig.from_pretrained(name))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(model, plan, hardware))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
