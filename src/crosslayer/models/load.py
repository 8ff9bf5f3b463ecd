"""Loading a language or vision-language model together with its processor and its proved sites."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from crosslayer.errors import UserError
from crosslayer.models.probe import probe
from crosslayer.models.proof import Proof
from crosslayer.models.resolve import resolve_sites
from crosslayer.models.sites import Sites, find_sites
from crosslayer.zoo import BUNDLED, GGUF

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By name; auto is that of the weights on disk."""
QUANTISED: dict[str, dict[str, Any]] = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
TOKENIZER_FILES = ("tokenizer*", "*processor_config.json", "vocab.*", "*.model", "merges.txt")
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model, the processor that feeds it and the sites where transcoders read and write."""

    id: str
    revision: str
    model: PreTrainedModel
    processor: Any
    """What makes inputs of text and pictures; None where the folder has no tokenizer."""
    sites: Sites
    proof: Proof | None
    """None of a sketch; see `sketch_model`."""

    @property
    def n_layers(self) -> int:
        """Decoder layers L."""
        return len(self.sites.layers)

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return self.sites.d_model

    @property
    def device(self) -> torch.device:
        """Where the model lies; of a sketch, where it would."""
        return torch.device(_best_device()) if self.proof is None else self.model.device

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        return _sees(self.model.config)

    @property
    def speaker(self) -> nn.Module:
        """The model that generates: BLIP-2 and InstructBLIP leave that to the language model inside."""
        inside = getattr(self.model, "language_model", None)
        return inside if isinstance(inside, PreTrainedModel) and inside.can_generate() else self.model

    @property
    def body(self) -> nn.Module:
        """The model without its head: enough to see every site."""
        return self.model.base_model


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    read: str = "resid",
    device: str | None = None,
    dtype: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    load_in: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and prove its sites on one small batch.

    Args:
        name: a bundled name (`emoji-llava`, `smollm2`), a folder, or a hub id.
        revision: of a hub id.
        read: `resid` or `mlp_in`; see `crosslayer.models.sites`.
        device: where to put it; a GPU when there is one.
        dtype: of the weights: `auto` (as they are on disk), `fp32`, `bf16`, `fp16`.
        device_map: how accelerate spreads the layers over several devices: `auto`, `balanced`, or device by module.
        load_in: `4bit` or `8bit`, by bitsandbytes.
        trust_remote_code: run model code that comes with a hub id.

    Raises:
        UserError: when there is no such model, its sites are not where they should be, or it cannot be loaded so.
    """
    _check_device(device, device_map)
    settings = _precision(dtype, load_in)
    if load_in is not None and device is not None:
        device_map = {"": device}  # quantised weights cannot be moved
    if device_map is not None:
        settings["device_map"] = device_map
    files = _files(str(name), revision=revision, trust_remote_code=trust_remote_code)
    config = _from_hub(AutoConfig, files)
    _check_decoder(config, str(name))
    model, loading = _from_hub(
        _auto_class(config), files, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    _check_weights(str(name), loading)
    model.eval().requires_grad_(False)
    if device_map is None and load_in is None:
        model.to(device or _best_device())
    processor = _processor(files, config)
    inputs = probe(model, processor, _sees(config))
    sites, proof = resolve_sites(model, read, inputs)
    notes = list(sites.notes)
    if _sees(config) and len(inputs) == 1:
        notes.append("proved on text alone: it came without a processor")
    if unused := sorted(loading["unexpected_keys"]):
        notes.append(f"{len(unused):,} tensors on disk have no place in the model, the first: {unused[0]}")
    return LoadedModel(str(name), revision or "", model, processor, replace(sites, notes=tuple(notes)), proof)


def load_processor(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """What feeds a model, a processor or a tokenizer, without its weights.

    Raises:
        UserError: when there is no such model, or it came without one.
    """
    files = _files(str(name), revision=revision, trust_remote_code=trust_remote_code)
    processor = _processor(files, _from_hub(AutoConfig, files))
    if processor is None:
        raise UserError(f"{name}: came without a tokenizer; add its files to the model's folder")
    return processor


def sketch_model(
    name: str | Path,
    *,
    revision: str | None = None,
    read: str = "resid",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A model of which only the configuration is there: no weights, no processor, nothing proved; for sizing alone.

    Raises:
        UserError: when there is no such configuration, or the family is not in the table.
    """
    chosen = _precision(dtype, None)["dtype"]
    files = _files(str(name), revision=revision, trust_remote_code=trust_remote_code)
    config = _from_hub(AutoConfig, files)
    _check_decoder(config, str(name))
    as_on_disk = config.dtype or torch.float32
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, dtype=as_on_disk if chosen == "auto" else chosen)
    return LoadedModel(str(name), revision or "", model, None, find_sites(model, read), None)


def has_weights(name: str | Path) -> bool:
    """Whether there is more to a model than a configuration; taken for granted of what is not a folder."""
    return not Path(name).is_dir() or _holds(Path(name), WEIGHTS)


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


@dataclass(frozen=True)
class _Files:
    """Where a model's files are, and what `from_pretrained` is told of them."""

    name: str
    source: str
    settings: dict[str, Any]


def _files(name: str, **settings: Any) -> _Files:
    source = _source(name)
    gguf = {"gguf_file": GGUF[name]} if name in GGUF else {}
    return _Files(name, source, {**settings, **gguf})


def _source(name: str) -> str:
    if name in BUNDLED:
        return str(BUNDLED[name]())
    if Path(name).exists():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name}: holds no config.json, so it is no Hugging Face model folder")
        return str(Path(name))
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such model folder; bundled names are {', '.join(BUNDLED)}")
    return name


def _from_hub(auto: Any, files: _Files, **settings: Any) -> Any:
    try:
        return auto.from_pretrained(files.source, **files.settings, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{files.name}: comes with model code of its own, which is not run; read it, then allow it with "
                f"--trust-remote-code ({reason})"
            ) from error
        raise UserError(
            f"{files.name}: no such model, or it cannot be loaded; give a bundled name ({', '.join(BUNDLED)}), "
            f"a model folder or a hub id. {auto.__name__} said: {reason}"
        ) from error


def _check_weights(name: str, loading: dict[str, Any]) -> None:
    """Refuse weights that are not there, or not of the shape that the configuration asks for: they would be random."""
    if loading["mismatched_keys"]:
        key, found, wanted = min(loading["mismatched_keys"])
        raise UserError(
            f"{name}: {key} is {list(found)} on disk, {list(wanted)} by config.json; get the two of one model"
        )
    if loading["missing_keys"]:
        raise UserError(
            f"{name}: lacks the weights {min(loading['missing_keys'])}, which would be random; get them too"
        )


def _processor(files: _Files, config: PretrainedConfig) -> Any:
    """What makes inputs of text and pictures; None of a folder that holds nothing of the kind."""
    kinds = (files.settings.get("gguf_file", "*.gguf"), *TOKENIZER_FILES)
    if Path(files.source).is_dir() and not _holds(Path(files.source), kinds):
        return None
    return _from_hub(AutoProcessor if _sees(config) else AutoTokenizer, files)


def _precision(dtype: str, load_in: str | None) -> dict[str, Any]:
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    if load_in is None:
        return {"dtype": DTYPES[dtype]}
    if load_in not in QUANTISED:
        raise UserError(f"load-in is {load_in!r}; choose one of {', '.join(QUANTISED)}")
    if find_spec("bitsandbytes") is None:
        raise UserError(f"load-in {load_in} needs bitsandbytes; pip install 'crosslayer[bitsandbytes]'")
    if not torch.cuda.is_available():
        raise UserError(f"load-in {load_in} needs a CUDA GPU, and torch sees none; leave it out")
    return {"dtype": DTYPES[dtype], "quantization_config": BitsAndBytesConfig(**QUANTISED[load_in])}


def _check_device(device: str | None, device_map: str | dict[str, Any] | None) -> None:
    if device is not None:
        _check_there(device)
    if device_map is None:
        return
    if device is not None:
        raise UserError(f"device {device} and device-map {device_map} are both given; choose one")
    if find_spec("accelerate") is None:
        raise UserError(f"device-map {device_map} needs accelerate; pip install 'crosslayer[accelerate]'")


def _check_there(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"device is {device!r}, which is not there; choose cpu, or leave it out ({reason})") from None


def _check_decoder(config: PretrainedConfig, name: str) -> None:
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise UserError(
            f"{name}: {config.model_type} is an encoder-decoder model, whose MLPs belong to two streams; only "
            "decoders are supported"
        )


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sees(config: PretrainedConfig) -> bool:
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForImageTextToText if _sees(config) else AutoModelForCausalLM
