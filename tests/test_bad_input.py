"""Bad input ends before an engine starts, with one clear message and a non-zero exit code, through the real script."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from datasets import Dataset
from peft import AdaptionPromptConfig, LilyConfig, LoraConfig, PrefixTuningConfig, XLoraConfig
from preloaded import said
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from fura_rl import FuraConfig
from fura_rl.adapters.registry import find_method, peft_config_for
from fura_rl.config import DATACLASSES, parse_arguments, resolve_model
from fura_rl.grpo_config import FuraGRPOConfig
from fura_rl.quickstart import BASE_MODEL
from fura_rl.run import prepare_run
from fura_rl.trainer import FuraGRPOTrainer
from fura_rl.trainer_settings import check_settings
from fura_rl.validation import CHOICES, RULES, TOGETHER

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")


def refused(*options):
    """The one line of the error, after checking that no engine and no traceback came before it."""
    text = said("launch/grpo_math.py", *options, code=2, timeout=240)
    assert "Traceback" not in text
    assert "EngineCore" not in text
    assert "Initializing a V1 LLM engine" not in text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text[-2000:]
    return errors[0]


def test_a_missing_model_path(tmp_path):
    error = refused("--config", QUICKSTART, "--model_name_or_path", "/no/such/model")
    assert "model_name_or_path='/no/such/model' does not exist" in error


def test_a_misspelt_yaml_key(tmp_path):
    config = tmp_path / "mine.yaml"
    settings = yaml.safe_load(Path(QUICKSTART).read_text())
    settings["lerning_rate"] = settings.pop("learning_rate")
    config.write_text(yaml.safe_dump(settings))
    error = refused("--config", config)
    assert f"unknown setting 'lerning_rate' in {config} (did you mean 'learning_rate'?)" in error


def test_a_dataset_without_a_gold_column(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1+1?"}\n')
    error = refused("--config", QUICKSTART, "--dataset_name", rows, "--eval_problems", 0)
    assert "none of the columns answer, solution" in error
    assert "answer_column" in error


def test_a_block_size_that_does_not_divide(tmp_path):
    error = refused("--config", QUICKSTART, "--adapter_kwargs", '{"block_size": 48}', "--output_dir", tmp_path)
    assert "block_size=48 does not divide in_features=128" in error
    assert "use one of 16, 32, 64" in error


def test_target_modules_that_match_nothing(tmp_path):
    error = refused("--config", QUICKSTART, "--adapter_target_modules", "query_key_value", "--output_dir", tmp_path)
    assert "query_key_value" in error
    assert "not found" in error


def test_an_adapter_on_the_embedding_of_a_model_whose_head_is_tied_to_it(tmp_path, monkeypatch):
    def started(**settings):
        raise AssertionError("the engine was started")

    monkeypatch.setattr("vllm.LLM", started)
    options = ["--adapter", "lora", "--adapter_target_modules", "q_proj", "embed_tokens", "--output_dir", str(tmp_path)]
    with pytest.raises(
        NotImplementedError,
        match=r"an adapter on model\.embed_tokens, but tie_word_embeddings.* Leave embed_tokens out of target_modules",
    ):
        prepare_run(parse_arguments(options, default_config=QUICKSTART))


@pytest.mark.parametrize("config", [PrefixTuningConfig(num_virtual_tokens=4), AdaptionPromptConfig(), XLoraConfig()])
def test_an_adapter_that_is_more_than_weights(config):
    with pytest.raises(ValueError, match=rf"{type(config).__name__} adds tokens to the input or weighs adapters by it"):
        check_settings(None, config)


def test_a_method_that_no_engine_can_be_served(tmp_path, monkeypatch):
    def started(**settings):
        raise AssertionError("the engine was started")

    monkeypatch.setattr("vllm.LLM", started)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    rows = Dataset.from_list([{"prompt": "1 + 1 = ?"}] * 4)
    args = FuraGRPOConfig(
        output_dir=str(tmp_path), use_vllm=True, vllm_mode="colocate", num_generations=2, use_cpu=True, bf16=False
    )
    with pytest.raises(NotImplementedError, match=r"peft\.tuners\.lily.* cannot be folded"):
        FuraGRPOTrainer(model, [len], args, train_dataset=rows, peft_config=LilyConfig(target_modules=["q_proj"], r=4))


def test_a_batch_that_does_not_divide_into_groups(tmp_path):
    error = refused("--config", QUICKSTART, "--num_generations", 7)
    assert "a batch of 128 completions is not divisible into groups of num_generations=7" in error
    assert "use num_generations=8, or a batch of 126" in error


def test_an_unknown_adapter():
    error = refused("--config", QUICKSTART, "--adapter", "furra")
    assert "adapter='furra' is not one of fura, svd, qfura, lora, " in error
    assert "did you mean 'fura'?" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lerning_rate", "1"], r"'lerning_rate' in the command line \(did you mean 'learning_rate'\?\)"),
        (["--config", "/no.yaml"], r"--config '/no.yaml' is not a file"),
        (["--adapter_kwargs", "{block_size: 4}"], r"adapter_kwargs='\{block_size: 4\}' is not JSON"),
        (["--eval_problems", "-1"], r"eval_problems='-1' in the command line: expected 0 or more"),
        (["--learning_rate", "fast"], r"learning_rate='fast' in the command line: expected a number"),
        (["--max_steps", "1.5"], r"max_steps='1.5' in the command line: expected a whole number"),
        (["--log_completions", "perhaps"], r"log_completions='perhaps' .* expected true or false"),
        (["--sync_audit_every", "auto"], r"sync_audit_every='auto' in the command line: expected a whole number"),
        (["--sync_audit_every", "-1"], r"sync_audit_every='-1' in the command line: expected 0 or more"),
        (["--beta", "0", "1"], r"beta='0 1' in the command line: expected a number, one only"),
        (["--report_to", "wandb", "none"], r"report_to=.*expected one value; a list goes into a YAML file"),
        (["--lr_scheduler_type", "liner"], r"lr_scheduler_type='liner'.*one of linear, .*; did you mean 'linear'\?"),
        (["--vllm_mode", "serve"], r"expected one of colocate, server; did you mean 'server'\?"),
        (["--loss_type", "dap"], r"loss_type='dap'.*; did you mean 'dapo'\?"),
        (["--sync_mode", "densely"], r"sync_mode='densely'.*auto, dense, factored; did you mean 'dense'\?"),
        (["--temperature", "0"], r"temperature='0' in the command line: expected more than 0"),
        (["--temperature", "2.5"], r"temperature=2.5 is more than 2, the highest that vLLM samples at"),
        (["--learning_rate", "nan"], r"learning_rate='nan'"),
        (["--num_generations", "1"], r"num_generations='1'.*expected 2 or more"),
        (["--vllm_gpu_memory_utilization", "1.5"], r"expected more than 0 and at most 1"),
        (["--alarm_truncated_frac", "2"], r"alarm_truncated_frac='2'.*a share between 0 and 1"),
        (["--generation_batch_size", "100"], r"generation_batch_size=100 is not divisible by .* = 128; use 128"),
        (["--generation_batch_size", "128", "--steps_per_generation", "1"], r"are both set: give one"),
        (["--max_completion_length", "192"], r"max_completion_length=192 leaves no room.*vllm_max_model_length=192"),
        (["--bf16", "true", "--fp16", "true"], r"bf16 and fp16 are both true"),
        (["--reward_funcs", "math_rewad"], r"reward_funcs='math_rewad' .*did you mean 'math_reward'\?"),
        (["--report_to", "swanlab"], r"report_to=swanlab is not installed: pip install swanlab"),
        (["--lora_target_modules", "q_proj"], r"lora_target_modules=.* is not read here.*set adapter_target_modules"),
        (["--use_dora", "true"], r"use_dora=True is not read here.*set adapter: dora"),
        (["--eval_samples", "0"], r"eval_samples='0' in the command line: expected 1 or more"),
        (["--adam_beta1", "2"], r"adam_beta1='2' in the command line: expected at least 0 and less than 1"),
        (["--adam_beta2", "1"], r"adam_beta2='1' .*expected at least 0 and less than 1"),
        (["--top_k", "-5"], r"top_k='-5' .*expected 1 or more, or 0 for all tokens"),
        (["--repetition_penalty", "0"], r"repetition_penalty='0' .*expected more than 0"),
        (["--min_p", "3"], r"min_p='3' .*expected a share between 0 and 1"),
        (["--epsilon", "-1"], r"epsilon='-1' .*expected 0 or more"),
        (["--eval_steps", "0"], r"eval_steps='0' .*expected more than 0"),
        (["--sync_probe_tolerance", "nan"], r"sync_probe_tolerance='nan' .*expected more than 0"),
        (["--vllm_server_timeout", "0"], r"vllm_server_timeout='0' .*expected more than 0"),
        (["--vllm_server_base_url", "not a url"], r"vllm_server_base_url='not a url': expected http://HOST:PORT"),
        (["--vllm_server_base_url", "http://a:1,b:2"], r"vllm_server_base_url='http://a:1,b:2': expected http://"),
        (["--eval_strategy", "steps", "--eval_problems", "0"], r"eval_strategy='steps' has nothing to evaluate"),
        (["--save_only_model", "true"], r"save_only_model=True leaves the optimizer out.*: leave it out"),
        (["--output_dir="], r"output_dir='' names no folder"),
        (["--report_to", "wandbb"], r"report_to='wandbb' is not one of all, none, .*did you mean 'wandb'\?"),
    ],
)
def test_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(options, default_config=QUICKSTART)


def refusal(tmp_path, **settings):
    """The faults of the quickstart with other settings, from a YAML file."""
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(Path(QUICKSTART).read_text()) | settings))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what the tests look at
        parse_arguments(["--config", str(config)])
    return str(caught.value).splitlines()


def test_all_faults_are_reported_at_once_with_key_value_and_expectation(tmp_path):
    first, *faults = refusal(
        tmp_path,
        lerning_rate=1, learning_rate="fast", max_steps=1.5, num_generations=7, adapter="furra", top_p=0,
        dtype="float31", reward_funcs="math_reward", bf16=3, beta=None, report_to={"a": 1}, eval_problems=-1,
        max_grad_norm=float("nan"),
    )  # fmt: skip
    where = f"in {tmp_path / 'mine.yaml'}: expected"
    expected = [
        "unknown setting 'lerning_rate'", f"learning_rate='fast' {where} a number",
        f"max_steps=1.5 {where} a whole number", "groups of num_generations=7; use num_generations=8",
        "adapter='furra' is not one of", f"top_p=0 {where} more than 0 and at most 1",
        f"dtype='float31' {where} one of auto, bfloat16, float16, float32; did you mean 'float32'?",
        f"reward_funcs='math_reward' {where} a list", f"bf16=3 {where} true or false", f"beta=None {where} a number",
        "report_to={'a': 1}", f"eval_problems=-1 {where} 0 or more", f"max_grad_norm=nan {where} 0 or more",
    ]  # fmt: skip
    assert first == f"{len(expected)} faults in the settings:"
    assert [text for text in expected if not any(text in fault for fault in faults)] == []
    assert len(faults) == len(expected)


def test_paths_that_do_not_exist_are_among_them(tmp_path):
    wrong = {
        "model_name_or_path": "/no/model",
        "dataset_name": "no/rows.jsonl",
        "report_to": "wandbb",
        "max_steps": 1.5,
    }
    _, *faults = refusal(tmp_path, **wrong)
    assert [name for name in wrong if not any(fault.strip().startswith(f"{name}=") for fault in faults)] == []
    assert len(faults) == len(wrong)
    [fault] = refusal(tmp_path, **wrong | {"dry_run": True, "report_to": "none", "max_steps": 1})
    assert fault.startswith("model_name_or_path="), "a dry run brings problems of its own, in a model's likeness"


def test_choices_that_this_project_lists_are_trls():
    from trl.trainer import grpo_trainer

    source = Path(grpo_trainer.__file__).read_text()
    names = ("loss_type", "vllm_importance_sampling_mode", "importance_sampling_level")
    assert [c for name in names for c in CHOICES[name] if f'"{c}"' not in source] == []


def test_every_rule_is_of_a_setting():
    known = {field.name for cls in DATACLASSES for field in dataclasses.fields(cls)}
    assert (RULES.keys() | CHOICES.keys() | {name for names in TOGETHER.values() for name in names}) <= known


@pytest.mark.parametrize(
    ("name", "message"),
    [(None, "is not set"), ("./nowhere", "does not exist"), ("nowhere", "does not exist"), (REPOSITORY, "config.json")],
)
def test_model_names_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_model(str(name) if name else None)


def test_settings_that_an_adapter_does_not_have():
    arguments = parse_arguments([], default_config=QUICKSTART)
    with pytest.raises(ValueError, match=r"FuraConfig has no setting 'blocksize' \(did you mean 'block_size'\?\)"):
        peft_config_for("fura", arguments.model, None, {"blocksize": 4})
    with pytest.raises(ValueError, match="adapter='full' takes no adapter_kwargs"):
        peft_config_for("full", arguments.model, None, {"r": 4})
    with pytest.raises(ValueError, match="did you mean 'lora'"):
        find_method("lorra")


@pytest.mark.parametrize(
    ("environment", "mode", "message"),
    [
        ({}, "colocate", r"FSDP shards the policy.*vllm_mode='server'"),
        ({"FSDP_VERSION": "1"}, "server", r"fsdp_version=1 flattens parameters.*use 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "server", r"fsdp_cpu_ram_efficient_loading=true.*set it to false"),
        ({}, "server", None),
    ],
)
def test_sharding_that_the_sync_cannot_read_is_refused(environment, mode, message, monkeypatch, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, vllm_mode=mode)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_settings(args, FuraConfig())


@pytest.mark.parametrize(
    ("stage", "adapter", "message"),
    [("3", FuraConfig(), r"zero_stage=3 loads.*fsdp2\.yaml"), ("2", FuraConfig(), None), ("3", LoraConfig(), None)],
)
def test_zero_3_which_leaves_no_whole_weight_is_refused_for_fura(stage, adapter, message, monkeypatch, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, use_vllm=True, vllm_mode="server")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_settings(args, adapter)


def test_a_script_of_ones_own_is_told_of_all_bad_values_too(tmp_path):
    args = FuraGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, sync_mode="densely", sync_probe_every=0,
        sync_audit_every=-1, alarm_truncated_frac=1.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sync_mode='densely' must be one of auto, dense, factored") as refusal:
        check_settings(args, None)
    for text in (
        "sync_probe_every=0 must be 1 or more",
        "sync_audit_every=-1 must be 0 or more",
        "alarm_truncated_frac=1.5 must be a share between 0 and 1",
    ):
        assert text in str(refusal.value)
    check_settings(FuraGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), None)
