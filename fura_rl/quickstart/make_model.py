"""Makes the base model of an embedded task: a 0.8M-parameter Qwen3 with a character-level tokenizer.

    python -m fura_rl.quickstart.make_model
    python -m fura_rl.quickstart.make_model --task multi_step --steps 850 --batch_size 64

It is trained, to convergence, on solutions that contain fixed rates of mistakes (`sloppy_solution` of the task), so it
has the skill and the bad habits at once: the state in which reinforcement learning from a verifier pays.  Seeded; on
two CPU cores it takes about a quarter of an hour.  The checkpoints that these commands wrote are shipped beside this
file; that of `multi_step` started from the quickstart's, which knows sums of two numbers already.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from fura_rl.quickstart.tasks import TASKS, Task

SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>")
CHARACTERS = " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, four chat tokens and an unknown token."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def make_batch(
    task: Task, tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int
) -> dict[str, torch.Tensor]:
    """A right-padded batch; labels (size, length) are -100 on the prompt and on padding."""
    rows = []
    for _ in range(size):
        problem, solution = task.pretraining_text(rng)
        prompt = tokenizer(f"<|user|>{problem}<|end|><|assistant|>").input_ids
        rows.append((prompt, tokenizer(f"{solution}<|end|>").input_ids))
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((size, length), tokenizer.pad_token_id)
    labels = torch.full((size, length), -100)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return {"input_ids": input_ids, "labels": labels}  # right padding under a causal mask needs no attention mask


def train(
    task: Task, steps: int, batch_size: int, learning_rate: float, seed: int
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Supervised training on sloppy solutions with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    if task.starts_from is None:
        model = Qwen3ForCausalLM(make_config(tokenizer))
    else:
        model = Qwen3ForCausalLM.from_pretrained(task.starts_from).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 30, num_training_steps=steps)
    progress = tqdm(range(steps), desc="base model")
    for step in progress:
        loss = model(**make_batch(task, tokenizer, rng, batch_size)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="quickstart")
    parser.add_argument("--output_dir", type=Path, help="folder to write [that of the shipped checkpoint]")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = TASKS[args.task]
    model, tokenizer = train(task, args.steps, args.batch_size, args.learning_rate, args.seed)
    output_dir = args.output_dir or task.base_model
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
