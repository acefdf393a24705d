"""Every setting there is: name, type, default, unit and meaning, each said once, on the field.

The sections and keys of the specification (`model`, `training`, `advanced`) keep their names and meaning; the other
sections extend them in the same shape. Unknown keys are refused. `docs/config.md` is generated from this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
TensorType = Literal[
    "auto", "base", "q8_0", "q6_K", "q5_K", "q4_K", "f16", "bf16", "f32",
    "q4_K_M", "q4_K_S", "q5_K_M", "q5_K_S", "all_q8_0", "all_q6_K", "all_q4_0",
]  # fmt: skip


class Section(BaseModel):
    """One section of the configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    base_model: str = Field(
        "embedded:smollm2-135m",
        description="Ollama name (`llama3.2:3b`, `hf.co/x/y:Q4_K_M`), a .gguf file, or `embedded:smollm2-135m`.",
        min_length=1,
    )
    model_family: str | None = Field(
        None,
        description="Expected family (`llama`, `qwen2`, …). Checked against the base model; None accepts any.",
    )
    context_window: PositiveInt = Field(
        8192,
        description="Longest example in tokens, and `num_ctx` of the exported model. Capped at what the base supports.",
    )
    quantization: str | None = Field(
        "auto",
        description=(
            "How the base weights are held in training: `as-served` keeps the GGUF blocks packed, `none` decodes them, "
            "`nf4` re-quantises with bitsandbytes, `auto` keeps them packed where that costs no time (the compiled "
            "kernels) and else decides from the memory there is. A GGUF quantisation such "
            "as `q4_K_M` means `as-served`, with a notice when the base is served in another one."
        ),
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Computation type. `auto` measures which of fp32 and bf16 is faster on this device.",
    )


class TrainingConfig(Section):
    method: Literal["fine-tuning", "continued-pretraining"] = Field(
        "fine-tuning",
        description="`fine-tuning` learns answers; `continued-pretraining` learns whole documents.",
    )
    epochs: PositiveInt = Field(3, description="Passes over the training data.")
    max_steps: PositiveInt | None = Field(
        None, description="Stop after this many optimiser steps; None runs all epochs."
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        4,
        description=(
            "Examples in one micro-batch on one process. `auto` cuts the optimiser batch of the default size into the "
            "largest micro-batches that fit."
        ),
    )
    gradient_accumulation_steps: PositiveInt = Field(
        8, description="Micro-batches in one optimiser batch."
    )
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(
        100,
        ge=0,
        description=(
            "Optimiser steps of linear warm-up: the first of N has 1/(N+1) of the peak, the one after them the peak. "
            "Ignored if `warmup_fraction` is set."
        ),
    )
    warmup_fraction: Fraction | None = Field(
        None, description="Warm-up as a fraction of all steps, instead of `warmup_steps`."
    )
    scheduler: Literal["linear", "cosine", "polynomial", "constant"] = Field(
        "cosine", description="Learning-rate schedule after the warm-up."
    )
    scheduler_power: float = Field(1.0, gt=0, description="Power of the polynomial schedule.")
    min_learning_rate_fraction: Fraction = Field(
        0.0, description="The schedule ends at this fraction of the peak learning rate."
    )
    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "adamw_8bit"] = Field(
        "adamw", description="`adamw_8bit` needs the `quantization` extra."
    )
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="Decay of the first moment; SGD's momentum."
    )
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the denominator of Adam.")
    weight_decay: float = Field(
        0.01,
        ge=0,
        description=(
            "Weight decay, never on biases, norms and embeddings: decoupled in AdamW and Adafactor, part of the "
            "gradient in SGD, none in Adam."
        ),
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this global norm; 0 turns clipping off."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the loss.")
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )
    fast_path: bool = Field(
        True,
        description="Use the fused training step where it is exact; False runs Transformers' own.",
    )
    native_kernels: bool = Field(
        True,
        description=(
            "On processors with AVX512-BF16 and a C compiler, compile the fused step's kernels once (bf16 only); "
            "False uses torch operators."
        ),
    )
    torch_compile: bool = Field(
        False,
        description=(
            "Run Transformers' own layers, compiled by torch.compile, instead of the fused step: dense weights only, "
            "needs a C++ compiler (Triton on a GPU), takes up to a minute or two to compile."
        ),
    )
    seed: int = Field(
        42, ge=0, le=2**32 - 1, description="Seed of Python, NumPy, torch and data order."
    )
    deterministic: bool = Field(
        True, description="Only deterministic algorithms. On CPU this costs nothing measurable."
    )
    evaluate_every_steps: PositiveInt | None = Field(
        None, description="Also validate every N optimiser steps; None validates per epoch only."
    )
    early_stopping_patience: PositiveInt | None = Field(
        None,
        description="Stop after this many validations without improvement; None never stops early.",
    )
    early_stopping_min_delta: float = Field(
        0.0, ge=0, description="Smallest fall in validation loss that counts as improvement."
    )
    checkpoint_every_steps: PositiveInt | None = Field(
        None, description="Also save `step_N.pt` every N optimiser steps."
    )
    keep_checkpoints: PositiveInt = Field(
        3,
        description="Best checkpoints kept by validation loss. The last, and the last finite one, stay as well.",
    )
    on_non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop", description="What to do, before any update, when loss or gradient is not finite."
    )
    on_loss_spike: Literal["off", "warn", "stop", "skip", "rollback"] = Field(
        "warn",
        description=(
            "What to do when a step's loss is more than 6 standard deviations above the mean of the last 128 steps; "
            "all but `warn` and `off` act before the update, as `on_non_finite` does."
        ),
    )
    overfitting_patience: PositiveInt | None = Field(
        2,
        description="Validations with rising validation loss and falling training loss before a warning; None is off.",
    )
    overfitting_gap: float | None = Field(
        0.5,
        gt=0,
        description=(
            "Warn also when the validation loss is above the training loss by more than this share of it, and the gap "
            "grows; None is off."
        ),
    )
    overfitting_raise_dropout: Fraction = Field(
        0.0,
        description="Added to the LoRA dropout when overfitting is detected; 0 changes nothing.",
    )


class AdvancedConfig(Section):
    lora_enabled: bool = Field(True, description="Train a LoRA adapter; False trains all weights.")
    lora_rank: PositiveInt = Field(8, description="Rank of the adapter.")
    lora_alpha: float = Field(16.0, gt=0, description="Adapter scale is alpha / rank.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    lora_target_modules: Names | Literal["all-linear"] = Field(
        "all-linear",
        description="Module names to adapt (`q_proj`, `v_proj`, …), or `all-linear`. No match is an error.",
    )
    lora_layers: PositiveInt | None = Field(
        None,
        description="Adapt only the last N decoder layers; None adapts all. More than there are is an error.",
    )
    use_rslora: bool = Field(False, description="Scale the adapter by alpha / sqrt(rank).")
    use_dora: bool = Field(
        False, description="Weight-decomposed LoRA: also trains a magnitude per row."
    )
    share_prefixes: bool = Field(
        True, description="Compute a prefix that examples of a batch share only once (exact)."
    )


class DistillationConfig(Section):
    teacher: str | None = Field(
        None,
        description=(
            "A larger model of the same vocabulary whose predictions take part in the loss (named like "
            "`model.base_model`); None trains on the data alone."
        ),
        min_length=1,
    )
    weight: Fraction = Field(
        0.5,
        description="Share of the teacher in the loss: (1 - weight) · cross-entropy + weight · temperature² · KL.",
    )
    temperature: float = Field(
        2.0,
        gt=0,
        description="Softens both distributions; above 1 the teacher's second choices count.",
    )
    quantization: Literal["auto", "as-served", "none"] = Field(
        "auto", description="How the teacher's weights are held (see `model.quantization`)."
    )


class DataSource(Section):
    path: str = Field(description="File or folder.")
    weight: float = Field(1.0, gt=0, description="Relative share of this source in an epoch.")
    columns: dict[str, str] | None = Field(
        None,
        description="Which of your columns hold `instruction`, `context`, `response`, `text`, …",
    )


class DataConfig(Section):
    sources: list[DataSource] = Field(
        default_factory=list,
        description="Where the records are. `--data PATH` replaces the list.",
    )
    system: str | None = Field(
        None,
        description="System message for records without one; None leaves it to the template's default.",
    )
    columns: dict[str, str] | None = Field(
        None, description="Column mapping for every source without one of its own."
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share split off for validation where the data has no validation files."
    )
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share split off as a test set where the data has none."
    )
    targets: Literal["all", "last"] = Field(
        "all", description="Train on every assistant turn, or on the last one only."
    )
    truncation: Literal["middle", "left", "error"] = Field(
        "middle",
        description="Where an over-long example loses context; its answer's end and EOS always stay.",
    )
    tokens_per_batch: PositiveInt | None = Field(
        None,
        description=(
            "Fill micro-batches up to this many tokens instead of `training.batch_size` examples. Rows are packed, "
            "never padded, either way, and examples never attend to each other."
        ),
    )
    group_by_length: bool = Field(
        False, description="Batch examples of similar length together (instead of random batches)."
    )
    window_overlap: int = Field(
        0, ge=0, description="Tokens shared by neighbouring windows in continued pre-training."
    )
    shuffle: bool = Field(True, description="A new order every epoch; False keeps the file order.")
    curriculum: Literal["none", "length", "score"] = Field(
        "none", description="First epoch from easy to hard, by token count or by the `score` field."
    )
    mixing_temperature: float = Field(
        1.0,
        gt=0,
        description="Source shares are weight × records^(1/temperature): above 1 evens them out.",
    )
    num_workers: PositiveInt | None = Field(
        None,
        description="Processes that tokenise large data once, before training; by default one per core.",
    )
    prefetch_batches: int | None = Field(
        None,
        ge=0,
        description=(
            "Micro-batches made ahead by a thread while another is computed on; by default 2 on a GPU and 0 on a CPU, "
            "whose cores are busy as it is. The results are the same."
        ),
    )
    pin_memory: bool | None = Field(
        None,
        description="Micro-batches in page-locked memory, from which copies to a GPU overlap; by default on a GPU.",
    )
    skip_bad: bool = Field(
        False,
        description="Set bad records aside in `rejected.jsonl` instead of stopping (at most 5 %).",
    )


class ValidationConfig(Section):
    batch_size: PositiveInt = Field(8, description="Examples in one validation batch.")
    metrics: list[str] = Field(
        default_factory=list,
        description="Metrics of generated answers: `exact_match`, `field_accuracy`, `rouge_l`, `file.py:function`.",
    )
    samples: int = Field(
        3, ge=0, description="Answers generated from validation records and saved per validation."
    )
    max_new_tokens: PositiveInt = Field(64, description="Longest generated answer in tokens.")


class ExportConfig(Section):
    tensor_type: TensorType = Field(
        "q8_0",
        description="Type that tuned tensors are written in, or a whole-file target (`q4_K_M`, …).",
    )
    accept_recovery: bool = Field(
        False, description="Write a tuned tensor even where less than 90 % of its update survives."
    )
    system: str | None = Field(
        None,
        description="SYSTEM of the exported model; None takes `data.system`, else the base's own.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="PARAMETERs of the exported model: `temperature: 0.7`, …"
    )
    stop: list[str] | None = Field(
        None, description="Stop texts; None derives them from the template."
    )
    licence: str | None = Field(None, description="LICENSE text; None carries the base's over.")


class OllamaConfig(Section):
    host: str | None = Field(
        None, description="Server address; None takes OLLAMA_HOST, else Ollama's own default."
    )
    models: Path | None = Field(
        None, description="Model store folder; None takes OLLAMA_MODELS, else the default places."
    )


class DistributedConfig(Section):
    backend: Literal["ddp", "fsdp", "deepspeed"] = Field(
        "ddp",
        description=(
            "How processes share the work under `--distributed`: `ddp` holds the model on each, `fsdp` a part of "
            "every weight, gradient and optimiser state, `deepspeed` what `zero_stage` says (needs the extra)."
        ),
    )
    zero_stage: Literal[1, 2, 3] = Field(
        2,
        description=(
            "What DeepSpeed's ZeRO shards: 1 the optimiser's state, 2 the gradients as well, 3 the weights as well."
        ),
    )
    timeout_seconds: PositiveInt = Field(
        600, description="A collective that takes longer ends the run with an error."
    )


class OutputConfig(Section):
    folder: Path = Field(
        Path("models/trained"),
        description="The run's folder: config, metrics, adapter, best model.",
    )
    checkpoints: Path | None = Field(
        None,
        description=(
            "Where `epoch_N.pt` files go; None is `checkpoints/` beside the default output folder, "
            "and `<output>/checkpoints/` for any other."
        ),
    )
    logs: Path = Field(Path("logs/training"), description="Where log files go.")


class Config(Section):
    """The whole configuration of a run."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())
    advanced: AdvancedConfig = Field(default_factory=lambda: AdvancedConfig())
    distillation: DistillationConfig = Field(default_factory=lambda: DistillationConfig())
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    validation: ValidationConfig = Field(default_factory=lambda: ValidationConfig())
    export: ExportConfig = Field(default_factory=lambda: ExportConfig())
    ollama: OllamaConfig = Field(default_factory=lambda: OllamaConfig())
    distributed: DistributedConfig = Field(default_factory=lambda: DistributedConfig())
    output: OutputConfig = Field(default_factory=lambda: OutputConfig())

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if self.data.validation_fraction + self.data.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must leave something to train on")
        if self.data.window_overlap >= self.model.context_window:
            raise ValueError("data.window_overlap must be smaller than model.context_window")
        return self
