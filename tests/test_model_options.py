"""The options of loading a model: passed on as they are, and enough for a dry run without weights."""

import pytest
import torch

from crosslayer import UserError
from crosslayer.model_options import AS_IT_IS, ModelOptions


def test_options_are_those_of_load_model(llama_folder):
    model = ModelOptions(dtype="bf16", device="cpu").load(str(llama_folder), "mlp_in")
    assert (model.model.dtype, model.device.type, model.sites.read) == (torch.bfloat16, "cpu", "mlp_in")
    assert AS_IT_IS.load(str(llama_folder)).model.dtype == torch.float32


def test_a_dry_run_loads_the_weights_that_are_there(llama_folder, llama, tmp_path):
    assert AS_IT_IS.sketch(str(llama_folder)).proof is not None
    llama.model.config.save_pretrained(tmp_path)
    sketch = ModelOptions(dtype="fp16").sketch(str(tmp_path))
    assert (sketch.proof, sketch.model.dtype) == (None, torch.float16)


def test_quantised_weights_that_are_not_there_are_not_sized(llama, tmp_path):
    llama.model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no weights, so what --load-in 4bit makes of them is not known"):
        ModelOptions(load_in="4bit").sketch(str(tmp_path))
