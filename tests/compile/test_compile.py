"""From weights to plans: three models through the whole command, on this machine's CPU."""

import asyncio
import itertools
import shutil
from dataclasses import replace

import pytest
from google.protobuf import text_format

from darkroom.storage import compiled_models
from engine.tensorrt.plans import Profile, find_plan
from tests.support.compiled_models import ARGUMENTS, FLAGS, ROOT
from tests.support.tiny_models import DEMO, tiny_xl
from workers.replica.model_host import ModelFailed, TritonTimeouts
from workers.replica.open_host import open_host

pytest.importorskip("onnxruntime", reason="needs the extra `compile`")
pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra `compile`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the first test that uses `compiled` waits for its exports
]


def compile_main(*arguments):
    from compile.__main__ import main

    return main([str(argument) for argument in arguments])


def plan_of(made, part):
    return find_plan(made.repository, part, command="-")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_part_has_a_plan_with_the_requested_profiles(compiled, name):
    made = compiled[name]
    sizes = [{"width": width, "height": height} for width, height in made.arguments.sizes]
    minimum, optimum, maximum = made.arguments.rows
    for part in made.arguments.parts:
        plan = plan_of(made, part)
        expected = {
            "unet": [Profile(rows=(minimum, optimum, maximum), **size) for size in sizes],
            "vae_decoder": [Profile(rows=(1, 4, 8), **size) for size in sizes],
        }.get(part, [Profile(rows=(1, optimum, maximum))])
        assert list(plan.record.profiles) == expected
        assert plan.record.builder_version == "1.7.1.116"
        assert plan.path.stat().st_size > 100_000
        assert plan.record.export.opset == 23


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_part_computes_the_same_as_torch_at_several_batch_sizes(compiled, name):
    made = compiled[name]
    for part in made.arguments.parts:
        export = plan_of(made, part).record.export
        is_half = made.arguments.precision == "fp16" and part != "vae_decoder"  # which overflows
        assert export.precision == ("float16" if is_half else "float32")
        assert 0 < export.deviation < {"float32": 5e-5, "float16": 5e-3}[export.precision]
        sizes = [f" {width}x{height}" for width, height in made.arguments.sizes]
        for size in [""] if "text" in part else sizes:
            for rows, output in itertools.product((1, 2, 5), export.outputs):
                assert f"{part}.{output.name}, {rows} rows{size}: off by" in made.output


def test_optimization_profiles_have_the_shapes_of_the_profiles(tmp_path):
    from compile.build import _optimization_profile, open_target, profiles_of
    from compile.parts import parts_of

    target = open_target("tensorrt-rtx", "8.9")
    builder = target.trt.Builder(target.trt.Logger())
    unet = parts_of(tiny_xl(tmp_path), "float16")[-2]
    [profile] = profiles_of(unet, (1, 2, 8), [(96, 64)])
    optimization = _optimization_profile(builder, unet, profile)
    assert bool(optimization)
    shapes = {
        port.name: [tuple(s) for s in optimization.get_shape(port.name)] for port in unet.inputs
    }
    assert shapes == {
        "sample": [(1, 4, 32, 48), (2, 4, 32, 48), (8, 4, 32, 48)],
        "timestep": [(1,), (2,), (8,)],
        "encoder_hidden_states": [(1, 77, 96), (2, 77, 96), (8, 77, 96)],
        "text_embeds": [(1, 64), (2, 64), (8, 64)],
        "time_ids": [(1, 6), (2, 6), (8, 6)],
    }


def test_an_onnx_file_of_other_weights_fails_the_comparison(compiled):
    from compile.export import onnx_path
    from compile.parity import ParityFailed, compare
    from compile.parts import parts_of

    encoder = parts_of(compiled["sd"].model, "float32")[0]
    network = encoder.load()
    next(network.parameters()).mul_(1.1)
    onnx = onnx_path(compiled["sd"].repository, "text_encoder")
    with pytest.raises(ParityFailed, match=r"text_encoder\.hidden, 1 rows"):
        compare(encoder, network, onnx, [], log=print)


def test_intact_plans_are_kept_and_damaged_ones_are_built_again(compiled, tmp_path, capsys):
    made = compiled["sd"]
    repository = shutil.copytree(made.repository, tmp_path / "plans")
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*.onnx")}
    plan = repository / "text_encoder/1/model.plan"
    plan.write_bytes(plan.read_bytes()[:-1])

    assert compile_main(*made.arguments.command_line(made.model, repository)) == 0

    output = capsys.readouterr().out
    assert "text_encoder: building" in output
    assert "unet: the plan exists" in output
    assert "vae_decoder: the plan exists" in output
    assert "exporting" not in output
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*.onnx")} == before
    find_plan(repository, "text_encoder", command="-")


def test_a_plan_of_other_profiles_is_built_from_the_same_onnx(compiled, tmp_path, capsys):
    made = compiled["sd"]
    repository = shutil.copytree(made.repository, tmp_path / "plans")

    wider = replace(made.arguments, rows=(2, 4, 32))
    assert compile_main(*wider.command_line(made.model, repository)) == 0

    output = capsys.readouterr().out
    assert "unet: building" in output
    assert "vae_decoder: the plan exists" in output
    assert "exporting" not in output
    assert find_plan(repository, "unet", command="-").max_rows(64, 64) == 32


@pytest.mark.parametrize("broken", ["weights", "config", "ONNX", "ONNX's weights", "precision"])
def test_an_onnx_file_of_another_model_is_not_used(compiled, tmp_path, broken):
    from compile.export import find_export, onnx_path
    from compile.parts import parts_of

    model = shutil.copytree(compiled["sd"].model, tmp_path / "model")
    repository = shutil.copytree(compiled["sd"].repository, tmp_path / "plans")
    onnx = onnx_path(repository, "unet")
    files = {
        "weights": model / "unet/diffusion_pytorch_model.safetensors",
        "config": model / "unet/config.json",
        "ONNX": onnx,
        "ONNX's weights": onnx.with_name("model.onnx.data"),
    }
    unet = parts_of(model, "float32")[1]
    assert find_export(repository, model, unet) is not None
    assert find_export(repository, model, unet, opset=20) is None

    if broken in files:
        with files[broken].open("ab") as file:
            file.write(b"\n")
    unet = parts_of(model, "float16" if broken == "precision" else "float32")[1]
    assert find_export(repository, model, unet) is None


# Triton


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_configurations_are_valid_for_triton(compiled, name):
    from tritonclient.grpc import model_config_pb2

    made = compiled[name]
    for part in made.arguments.parts:
        text = (made.repository / part / "config.pbtxt").read_text()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        record = plan_of(made, part).record
        assert (config.name, config.backend) == (part, "tensorrt")
        assert config.max_batch_size == max(profile.rows[2] for profile in record.profiles)
        assert len(config.instance_group[0].profile) == len(record.profiles)
        assert [port.name for port in config.input] == [p.name for p in record.export.inputs]
        assert [port.name for port in config.output] == [p.name for p in record.export.outputs]
    assert config.input[0].dims[0] == 4


def test_a_real_triton_reads_them_up_to_its_missing_backend(compiled, tmp_path):
    made = compiled["demo"]
    broken = shutil.copytree(made.repository / "unet", tmp_path / "unet")
    config = broken / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: [ 1 ] reshape { shape: [ ] }", "dims: [ ]"))

    async def load_errors(repository, parts):
        host = open_host("subprocess", repository, {}, timeouts=TritonTimeouts(exit_s=5))
        await host.start()
        try:
            return {part: await load_error(host, part) for part in parts}
        finally:
            await host.stop()

    async def load_error(host, part):
        with pytest.raises(ModelFailed) as failed:
            await host.load(part)
        return str(failed.value)

    sound = asyncio.run(load_errors(made.repository, made.arguments.parts))
    assert all(
        "unable to find backend library for backend 'tensorrt'" in error for error in sound.values()
    )
    assert "failed to poll" in asyncio.run(load_errors(tmp_path, ["unet"]))["unet"]


# The command


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        (["nowhere"], 2, "neither a folder nor a hub id"),
        ([ROOT / "tests"], 2, "no model_index.json"),
        ([DEMO, "--size", "65x64", "--dry-run"], 2, "multiples of 32"),
        ([DEMO], 2, "tensorrt cannot be imported"),
        ([DEMO, *FLAGS], 1, "pass --compute-capability"),
        ([DEMO, *FLAGS, "--compute-capability", "4.2"], 1, "does not support compute capability"),
    ],
)
def test_impossible_arguments_fail_before_the_work(tmp_path, capsys, changed, code, message):
    if changed == [DEMO] and shutil.which("nvidia-smi"):
        pytest.skip("TensorRT may be installed")
    assert compile_main(*changed, "--output", tmp_path) == code
    output = capsys.readouterr()
    assert message in output.err
    assert "exporting" not in output.out


def test_a_model_of_another_kind_is_rejected(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert compile_main(tmp_path, "--dry-run", "--size", "64x64", "--output", tmp_path / "out") == 2
    assert "is a FluxPipeline, not a Stable Diffusion 1, 2 or XL" in capsys.readouterr().err


@pytest.mark.parametrize("rows", ["2", "4,2,1", "0,1,2", "1,2,3,4"])
def test_invalid_rows_are_a_usage_error(capsys, rows):
    with pytest.raises(SystemExit) as exited:
        compile_main(DEMO, "--rows", rows)
    assert exited.value.code == 2
    assert "--rows" in capsys.readouterr().err


def test_a_repository_can_be_pushed_to_s3_and_pulled(compiled, s3_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_settings.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_settings.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_settings.secret_access_key)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    source, url = compiled["sd"].repository, f"s3://{s3_settings.bucket}/plans/sd"
    files = [path for path in source.rglob("*") if path.is_file()]

    assert compiled_models.push(source, url) == len(files)
    assert compiled_models.push(source, url) == 0
    assert compiled_models.pull(url, tmp_path) == len(files)
    assert compiled_models.pull(url, tmp_path) == 0
    (tmp_path / "unet/1/model.plan").write_bytes(b"half of it")
    assert compiled_models.pull(url, tmp_path) == 1
    for part in ARGUMENTS["sd"].parts:
        find_plan(tmp_path, part, command="-")
