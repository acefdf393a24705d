"""The other formats of an export: Transformers' folder, and the adapter with what rules it out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ollatune.base.errors import InputError
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.export.adapter_bundle import write_adapter_bundle
from ollatune.export.bundle import BOS_KEY, plan_bundle, write_bundle
from ollatune.export.hf_config import readable_by_older
from ollatune.export.hf_folder import write_hf_folder
from ollatune.export.identity import IDENTITY_KEY
from ollatune.export.metadata_edits import DropKey, edited_records
from ollatune.export.serving import plan_serving
from ollatune.gguf.reader import GGUFFile
from ollatune.gguf.writer import TensorToWrite, write_gguf
from ollatune.modeling.base import BaseSource, resolve_base
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import adapter_state, inject_lora
from ollatune.modeling.opened import OpenBase, open_base
from ollatune.modeling.trained import load_trained, lora_settings
from tests.run_helpers import tiny_base
from tests.tiny_models import RECIPES

RECIPES_IN_HF = sorted(set(RECIPES) - {"llama-other-rope"})


def tiny(
    folder: Path, recipe: str = "llama", **advanced: Any
) -> tuple[OpenBase, Checkpoint, Config]:
    """A tiny base with an adapter of random factors on every linear layer, as a checkpoint."""
    base = open_base(resolve_base(str(tiny_base(folder, recipe))))
    config = Config.model_validate({"advanced": {"lora_rank": 4, **advanced}})
    model = load_base_model(base.gguf)
    if config.advanced.lora_enabled:
        inject_lora(model, lora_settings(config), seed=0)
        state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    else:
        state = {name: tensor.clone() for name, tensor in model.named_parameters()}
    torch.manual_seed(1)
    for name, tensor in state.items():
        if "magnitude" not in name:
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return base, checkpoint_of(base, state), config


def checkpoint_of(base: OpenBase, state: dict[str, torch.Tensor]) -> Checkpoint:
    return Checkpoint(
        epoch=1, step=5, model_state_dict=state, optimizer_state_dict={}, scheduler_state_dict={},
        train_loss=1.0, val_loss=1.0, config={}, timestamp="", run_id="run",
        base={"name": base.source.name, "digest": base.source.digest, "origin": "file"},
    )  # fmt: skip


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([[128, 40, 41, 77, 90, 33, 128, 65]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()


def load_hf(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@pytest.mark.parametrize("recipe", ["llama", "gemma3", "mixtral"])
def test_transformers_loads_the_trained_model(tmp_path: Path, recipe: str) -> None:
    check_hf(tmp_path, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(set(RECIPES_IN_HF) - {"llama", "gemma3", "mixtral"}))
def test_transformers_loads_every_architecture(tmp_path: Path, recipe: str) -> None:
    check_hf(tmp_path, recipe)


def check_hf(folder: Path, recipe: str) -> None:
    base, checkpoint, config = tiny(folder / "base", recipe)
    written = write_hf_folder(
        base, checkpoint, config, folder / "hf", dtype=torch.float32, context=256
    )
    trained = load_trained(base, checkpoint.model_state_dict, config)
    difference = (logits_of(load_hf(written.folder)) - logits_of(trained)).abs().max()
    assert difference < 2e-4, difference
    untuned = (logits_of(load_base_model(base.gguf)) - logits_of(trained)).abs().max()
    assert untuned > 0.1


def test_all_weights_dora_and_shards(tmp_path: Path) -> None:
    for number, advanced in enumerate(({"lora_enabled": False}, {"use_dora": True})):
        base, checkpoint, config = tiny(tmp_path / f"base{number}", **advanced)
        folder = tmp_path / f"hf{number}"
        written = write_hf_folder(
            base, checkpoint, config, folder, dtype=torch.float32, context=256, shard_bytes=100_000
        )
        assert len(written.files) > 2
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        assert set(index["weight_map"].values()) == {path.name for path in written.files}
        trained = load_trained(base, checkpoint.model_state_dict, config)
        assert (logits_of(load_hf(folder)) - logits_of(trained)).abs().max() < 2e-4
        assert (folder / "adapter").exists() == bool(advanced.get("use_dora"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # inside peft
def test_the_tokenizer_and_the_adapter_go_along(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    base, checkpoint, config = tiny(tmp_path / "base")
    folder = tmp_path / "hf"
    write_hf_folder(base, checkpoint, config, folder, dtype=torch.bfloat16, context=256)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.encode("Hi two") == base.tokenizer.encode("Hi two")
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos>user:Hi<eos><bos>assistant:"
    adapted = PeftModel.from_pretrained(load_base_model(base.gguf), folder / "adapter")
    trained = load_trained(base, checkpoint.model_state_dict, config)
    assert torch.allclose(logits_of(adapted), logits_of(trained), atol=1e-4)
    config_json = json.loads((folder / "config.json").read_bytes())
    assert (config_json["torch_dtype"], config_json["rope_theta"]) == ("bfloat16", 10000.0)
    ends = json.loads((folder / "generation_config.json").read_bytes())["eos_token_id"]
    assert ends == sorted(base.tokenizer.end_of_generation_ids)


def test_older_names_say_what_the_newer_ones_say() -> None:
    llama = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    filled = readable_by_older({"dtype": torch.float16, "rope_parameters": llama})
    assert filled["torch_dtype"] == filled["dtype"] == "float16"
    assert filled["rope_theta"] == 5e5
    assert filled["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", "factor": 8.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    stretched = readable_by_older({"rope_parameters": yarn, "max_position_embeddings": 256})
    assert stretched["max_position_embeddings"] == 64
    plain = readable_by_older({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    assert plain["rope_scaling"] is None


def test_rotary_factors_without_a_name_are_refused(tmp_path: Path) -> None:
    base, checkpoint, config = tiny(tmp_path / "base", "llama-other-rope")
    with pytest.raises(InputError, match=r"rotary factors \(`rope_freqs.weight`\)"):
        write_hf_folder(base, checkpoint, config, tmp_path / "hf", dtype=torch.float32, context=256)
    assert not (tmp_path / "hf").exists()


def test_a_weight_beyond_f16_is_refused_and_nothing_loads_the_folder(tmp_path: Path) -> None:
    base, checkpoint, config = tiny(tmp_path / "base", lora_enabled=False)
    checkpoint.model_state_dict["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    folder = tmp_path / "hf"
    write_hf_folder(base, checkpoint, config, folder, dtype=torch.float32, context=256)
    with pytest.raises(InputError, match=r"`blk.1.ffn_up.weight` holds 1e\+06, more than 65504"):
        write_hf_folder(base, checkpoint, config, folder, dtype=torch.float16, context=256)
    assert not (folder / "config.json").exists()


def with_source(base: OpenBase, **changes: Any) -> OpenBase:
    from dataclasses import replace

    fields = {"origin": "store", "name": "tiny:latest", **changes}
    source: BaseSource = replace(base.source, **fields)
    return replace(base, source=source)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"renderer": "qwen3-coder"}, "served through `qwen3-coder`, built into the server"),
        ({"messages": ({"role": "user", "content": "x"},)}, "puts 1 MESSAGE"),
    ],
)
def test_what_an_adapter_would_inherit_rules_it_out(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    base, checkpoint, config = tiny(tmp_path / "base")
    with pytest.raises(InputError, match=reason) as caught:
        write_adapter_bundle(
            with_source(base, **changes), checkpoint, config, tmp_path / "out", context=256
        )
    assert "--format gguf" in caught.value.hint
    bundle = write_bundle(
        with_source(base, **changes), checkpoint, config, tmp_path / "merged", context=256
    )
    assert any("left out" in note for note in bundle.serving.notes)
    assert not bundle.modelfile.renderer
    assert not bundle.modelfile.messages


def test_what_an_adapter_cannot_express_is_refused(tmp_path: Path) -> None:
    for number, (advanced, reason) in enumerate(
        (({"lora_enabled": False}, "trained all weights"), ({"use_dora": True}, "DoRA"))
    ):
        base, checkpoint, config = tiny(tmp_path / f"base{number}", **advanced)
        with pytest.raises(InputError, match=reason):
            write_adapter_bundle(base, checkpoint, config, tmp_path / "out", context=256)
    assert not (tmp_path / "out").exists()


def test_the_modelfile_of_an_adapter_names_its_base(tmp_path: Path) -> None:
    base, checkpoint, config = tiny(tmp_path / "base")
    bundle = write_adapter_bundle(base, checkpoint, config, tmp_path / "file", context=256)
    assert bundle.modelfile.source == str(base.source.path)
    assert bundle.modelfile.adapter == "./adapter.gguf"
    stored = with_source(base, licences=("MIT",), parameters={"top_k": 5, "repeat_penalty": 1.3})
    bundle = write_adapter_bundle(stored, checkpoint, config, tmp_path / "store", context=256)
    assert bundle.modelfile.source == "tiny:latest"
    assert bundle.modelfile.licenses == ()  # inherited: it would be there twice
    assert bundle.modelfile.parameters["top_k"] == 5
    assert bundle.modelfile.parameters["repeat_penalty"] == 1.0
    assert any("repeat_penalty 1.3 is not taken over" in note for note in bundle.serving.notes)
    report = json.loads((tmp_path / "store" / "export.json").read_bytes())
    assert (report["format"], report["sha256"]) == ("adapter", bundle.result.sha256)


def test_each_export_names_itself_in_its_metadata(tmp_path: Path) -> None:
    base, checkpoint, config = tiny(tmp_path / "base")
    bundle = write_bundle(base, checkpoint, config, tmp_path / "out", context=256)
    with GGUFFile.open(bundle.gguf_path) as written:
        assert written.metadata[IDENTITY_KEY] == bundle.identity
        for key in base.gguf.metadata:
            assert written.metadata_record(key) == base.gguf.metadata_record(key)
    again = write_bundle(base, checkpoint, config, tmp_path / "again", context=256)
    assert again.identity == bundle.identity
    other = Config.model_validate({"advanced": {"lora_rank": 4}, "export": {"tensor_type": "f16"}})
    assert (
        plan_bundle(base, checkpoint, other).records
        != plan_bundle(base, checkpoint, config).records
    )
    name = next(iter(checkpoint.model_state_dict))
    checkpoint.model_state_dict[name][0, 0] += 1e-3
    assert (
        write_bundle(base, checkpoint, config, tmp_path / "b", context=256).identity
        != bundle.identity
    )


def test_a_licence_loses_only_what_the_parser_would_drop(tmp_path: Path) -> None:
    base, checkpoint, config = tiny(tmp_path / "base")
    licensed = with_source(
        base, licences=("A\u00a0licence\x0c\nof two lines", '"""two\nlines """\n""" more')
    )
    bundle = write_bundle(licensed, checkpoint, config, tmp_path / "out", context=256)
    assert bundle.modelfile.licenses == ("A licence \nof two lines",)
    assert bundle.serving.licences == licensed.source.licences


def test_stops_and_parameters_of_the_base(tmp_path: Path) -> None:
    base, _, config = tiny(tmp_path / "base")
    given = {
        "stop": ["<|stop|>", "<eos>"],
        "typical_p": 0.9,
        "mirostat": 1,
        "top_k": 7,
        "repeat_penalty": 1.3,
    }
    with_parameters = with_source(base, parameters=given)
    serving = plan_serving(with_parameters, config, 64)
    assert serving.parameters["stop"] == ["<|stop|>", "<eos>"]
    assert (serving.parameters["top_k"], serving.parameters["repeat_penalty"]) == (7, 1.0)
    assert not {"typical_p", "mirostat"} & serving.parameters.keys()
    notes = " ".join(serving.notes)
    for expected in (
        "typical_p 0.9 is left out",
        "parameter mirostat is left out",
        "repeat_penalty 1.3 is not",
    ):
        assert expected in notes
    own = Config.model_validate({"export": {"stop": ["only"]}})
    assert plan_serving(with_parameters, own, 64).parameters["stop"] == ["only"]
    single = with_source(base, parameters={"stop": "<x>"})
    assert plan_serving(single, config, 64).parameters["stop"] == ["<x>", "<eos>"]


def test_what_the_base_is_besides_its_weights_is_said(tmp_path: Path) -> None:
    base, checkpoint, config = tiny(tmp_path / "base")
    richer = with_source(base, num_merged=2, has_projector=True)
    notes = " ".join(plan_serving(richer, config, 64).notes)
    assert "2 LoRA adapter(s) are merged into the weights" in notes
    assert "projector is left out" in notes
    with pytest.raises(InputError, match=r"carries 2 adapter\(s\) already"):
        write_adapter_bundle(richer, checkpoint, config, tmp_path / "out", context=64)


@pytest.mark.parametrize("is_said", [True, False])
def test_whether_prompts_begin_with_bos_is_always_said(tmp_path: Path, is_said: bool) -> None:
    """Servers guess differently where a file leaves it open."""
    base, checkpoint, config = tiny(tmp_path / "base")
    assert base.gguf.metadata[BOS_KEY] is False
    if not is_said:
        silent = tmp_path / "silent.gguf"
        with base.gguf as file:
            tensors = [
                TensorToWrite(info.name, info.shape, info.type, lambda n=info.name: [file.tensor_data(n)])
                for info in file.tensors.values()
            ]  # fmt: skip
            write_gguf(silent, edited_records(file, [DropKey(BOS_KEY)]), tensors)
        base = open_base(resolve_base(str(silent)))
        assert BOS_KEY not in base.gguf.metadata
    bundle = write_bundle(base, checkpoint, config, tmp_path / "out", context=64)
    with GGUFFile.open(bundle.gguf_path) as written:
        assert written.metadata[BOS_KEY] is base.tokenizer.add_bos
