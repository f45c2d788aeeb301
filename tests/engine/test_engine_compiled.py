"""The runner of compiled parts, with the parts as they are before they are compiled."""

import pytest
import torch

from compile.parts import parts_of
from engine.tensorrt.compiled_runner import CompiledRunner, read_pipeline_config
from engine.torch_runner import TorchRunner
from tests.support.engine_requests import events, levels_apart, pictures, row
from tests.support.tiny_models import DEMO, tiny_sd, tiny_xl


class Uncompiled:
    """A part behind its ports, in PyTorch: what is exported, and takes so many rows."""

    def __init__(self, part, most_rows):
        self.most_rows = most_rows
        self._part, self._module = part, part.load()

    @torch.inference_mode()
    def __call__(self, inputs):
        given = [inputs[port.name] for port in self._part.inputs]
        assert len(given) == len(inputs)
        assert max(map(len, given)) <= self.most_rows
        names = [port.name for port in self._part.outputs]
        return dict(zip(names, self._module(*given), strict=True))


def uncompiled_runner(model_dir, *, most_texts):
    networks = {
        part.name: Uncompiled(part, most_texts if "text" in part.name else 16)
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
def test_the_parts_of_a_model_draw_what_the_model_does(models, name):
    asked = [
        row("a red apple", negative_prompt="fog"),
        row("a lighthouse", seed=3, guidance_scale=1.0),
        row("a fox", seed=5, scheduler="dpmsolver++", num_inference_steps=5),
    ]
    theirs = pictures(events(TorchRunner.load(models[name], threads=2), *asked))
    ours = pictures(events(uncompiled_runner(models[name], most_texts=2), *asked))

    assert sorted(ours) == sorted(theirs) == [0, 1, 2]
    assert levels_apart(theirs[0], theirs[2]) > 50  # it is not one picture for all
    assert max(levels_apart(ours[at], theirs[at]) for at in ours) <= 1


def test_texts_beyond_what_an_encoder_takes_are_encoded_in_turns(models):
    few, many = (uncompiled_runner(models["sd"], most_texts=most) for most in (3, 16))
    words = [f"a {thing}" for thing in ("cat", "dog", "fox", "hen", "owl", "rose", "tree", "boat")]
    in_turns, at_once = few.encode([*words, words[0]]), many.encode(words)

    assert torch.equal(in_turns[0], in_turns[8])
    assert torch.allclose(in_turns[:8], at_once, atol=1e-5)
    assert not torch.allclose(in_turns[0], in_turns[1], atol=1e-2)
