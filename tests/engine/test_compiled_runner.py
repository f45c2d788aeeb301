"""The runner of compiled parts, with the parts before compilation."""

import pytest
import torch

from compile.parts import parts_of
from engine.tensorrt.compiled_runner import CompiledRunner, read_pipeline_config
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import events, images, levels_apart, row
from tests.support.tiny_models import DEMO, tiny_sd, tiny_xl


class UncompiledNetwork:
    """A part in PyTorch, as it is exported, with a limit of rows."""

    def __init__(self, part, max_rows):
        self.max_rows = max_rows
        self._part, self._module = part, part.load()

    @torch.inference_mode()
    def __call__(self, inputs):
        given = [inputs[port.name] for port in self._part.inputs]
        assert len(given) == len(inputs)
        assert max(map(len, given)) <= self.max_rows
        names = [port.name for port in self._part.outputs]
        return dict(zip(names, self._module(*given), strict=True))


def uncompiled_runner(model_dir, *, max_texts):
    networks = {
        part.name: UncompiledNetwork(part, max_texts if "text" in part.name else 16)
        for part in parts_of(model_dir, "float32")
    }
    return CompiledRunner(
        read_pipeline_config(model_dir), networks, sizes=None, device=torch.device("cpu")
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"demo": DEMO, "sd": tiny_sd(folder / "sd"), "xl": tiny_xl(folder / "xl")}


@pytest.mark.parametrize("name", ["demo", "sd", "xl"])
def test_the_parts_of_a_model_generate_the_same_images(models, name):
    rows = [
        row("a red apple", negative_prompt="fog"),
        row("a lighthouse", seed=3, guidance_scale=1.0),
        row("a fox", seed=5, scheduler="dpmsolver++", num_inference_steps=5),
    ]
    theirs = images(events(TorchRunner.load(models[name], threads=2), *rows))
    ours = images(events(uncompiled_runner(models[name], max_texts=2), *rows))

    assert sorted(ours) == sorted(theirs) == [0, 1, 2]
    assert levels_apart(theirs[0], theirs[2]) > 50  # the images differ at all
    assert max(levels_apart(ours[at], theirs[at]) for at in ours) <= 1


def test_texts_beyond_an_encoders_limit_are_encoded_in_chunks(models):
    few, many = (uncompiled_runner(models["sd"], max_texts=limit) for limit in (3, 16))
    words = [f"a {thing}" for thing in ("cat", "dog", "fox", "hen", "owl", "rose", "tree", "boat")]
    chunked, at_once = few.encode([*words, words[0]]), many.encode(words)

    assert torch.equal(chunked[0], chunked[8])
    assert torch.allclose(chunked[:8], at_once, atol=1e-5)
    assert not torch.allclose(chunked[0], chunked[1], atol=1e-2)
