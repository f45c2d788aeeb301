"""The models of this repository are what their cards say."""

import shutil

import pytest

from darkroom.errors import InvalidInput, SetupError
from darkroom.generation.model_registry import load_registry, weights_revision
from darkroom.generation.params import JobInput
from darkroom.settings import Settings


def test_every_models_revision_is_that_of_its_weights(registry):
    for model in registry.models.values():
        assert model.revision == weights_revision(model.folder), model.name


def test_every_model_brings_its_licenses_along(registry):
    for model in registry.models.values():
        assert (model.folder / "ATTRIBUTION.md").exists(), model.name


def test_another_revision_or_size_is_another_microbatch(registry):
    model = registry.models[registry.default]
    params = registry.resolve(JobInput(prompt="a cat"))
    keys = {
        model.microbatch_key(params),
        model.microbatch_key(params.model_copy(update={"width": 64})),
        model.model_copy(update={"revision": "0" * 12}).microbatch_key(params),
    }
    assert len(keys) == 3
    assert model.microbatch_key(params.model_copy(update={"seed": 1})) in keys


def test_an_old_revision_is_found_by_name(registry):
    old = registry.models["darkroom-demo-v1"]
    asked = registry.resolve(JobInput(prompt="a cat", model=f"darkroom-demo@{old.revision}"))
    assert asked.model == old.name

    new = registry.models["darkroom-demo"]
    asked = registry.resolve(JobInput(prompt="a cat", model=f"darkroom-demo@{new.revision}"))
    assert asked.model == new.name


@pytest.mark.parametrize("name", ["darkroom-demo@000000000000", "other@67599f693183", "@", "a@"])
def test_a_revision_that_was_not_kept_is_rejected(registry, name):
    with pytest.raises(InvalidInput, match="unknown model"):
        registry.resolve(JobInput(prompt="a cat", model=name))


def test_jobs_use_the_revision_that_they_were_accepted_for(registry):
    old, new = registry.models["darkroom-demo-v1"], registry.models["darkroom-demo"]
    params = registry.resolve(JobInput(prompt="a cat"))
    before = new.model_copy(update={"revision": old.revision}).microbatch_key(params)
    gone = new.model_copy(update={"revision": "0" * 12}).microbatch_key(params)

    assert registry.model_for(new.name, before) == old
    assert registry.model_for(new.name, new.microbatch_key(params)) == new
    assert registry.model_for(new.name, gone) == new
    assert registry.model_for_key("other@000000000000/64x64/float32") is None


def test_every_violated_limit_is_named(registry):
    job = JobInput(prompt="a cat", width=97, height=7, num_inference_steps=0, guidance_scale=99.0)
    with pytest.raises(InvalidInput) as rejected:
        registry.resolve(job)

    assert [(p.loc, p.code) for p in rejected.value.problems] == [
        (("width",), "not_a_multiple"),
        (("height",), "out_of_range"),
        (("num_inference_steps",), "out_of_range"),
        (("guidance_scale",), "out_of_range"),
    ]


def test_a_missing_default_model_is_a_setup_error(tmp_path):
    with pytest.raises(SetupError, match="DARKROOM_DEFAULT_MODEL"):
        load_registry(tmp_path, "darkroom-demo")


def test_a_card_with_a_mistake_is_named(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(Settings().models_dir / "darkroom-demo" / "darkroom.toml", folder)
    card = folder / "darkroom.toml"
    card.write_text(card.read_text().replace("max_microbatch", "max_macrobatch"))

    with pytest.raises(SetupError, match="max_macrobatch"):
        load_registry(tmp_path, "mine")
