"""Files of every accepted kind become networks; what is no image classifier is refused with a line that says so."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from audit_plugin.errors import AuditError, ExportError, IntakeError, SubjectError
from audit_plugin.intake import inspect
from audit_plugin.model.guarded import guarded_model
from audit_plugin.model.input_spec import open_shape, resolve_input_spec
from audit_plugin.model.load import Network, load_network
from audit_plugin.model.save import example_input
from audit_plugin.model.subject import Subject, check_parity, prepare_subject
from audit_plugin.model.torch_graph import plain_graph
from audit_plugin.policy import ModelPolicy
from audit_plugin.types import InputSpec, Intake

Load = Callable[..., Network]
SIZE = 8


class Tiny(nn.Module):
    """Two convolutions and a linear layer, with batch normalisation that has seen something."""

    def __init__(self, channels: int = 3, classes: int = 5, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(width * SIZE * SIZE // 4, classes)
        self.body[1].running_mean.uniform_(-1, 1)
        self.body[1].running_var.uniform_(0.5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.body(images)).flatten(1))


def save_program(module: nn.Module, path: Path, shape: tuple[int, ...] = (3, SIZE, SIZE), batch: int | None = None) -> Path:
    example = torch.rand(batch or 4, *shape)
    dynamic = None if batch else ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(module.eval(), (example,), dynamic_shapes=dynamic), path)
    return path


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Save as a .pt2 in a folder of its own, have it inspected, load it."""

    def run(module: nn.Module, shape: tuple[int, ...] = (3, SIZE, SIZE), batch: int | None = None) -> Network:
        save_program(module, tmp_path / "model.pt2", shape, batch)
        return load_network(tmp_path / "model.pt2", inspect(tmp_path))

    return run


def subject_of(network: Network, **policy: object) -> Subject:
    spec = resolve_input_spec(network.input_shape, ModelPolicy(**policy), {})  # type: ignore[arg-type]
    names = tuple(str(index) for index in range(network.class_count))
    return prepare_subject(network, spec, flavour="pt2", class_names=names)


def pictures(count: int, shape: tuple[int, ...] = (3, SIZE, SIZE)) -> np.ndarray:
    channels, height, width = shape
    return np.random.default_rng(1).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def answers(module: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)).numpy()


def assert_same_answers(subject: Subject, module: nn.Module, images: np.ndarray) -> None:
    np.testing.assert_allclose(subject.logits(images), answers(module, images), rtol=1e-3, atol=1e-4)
    assert len(check_parity(subject, images)) == len(subject.summary.taps) + 1


# -------------------------------------------------------------------------------------------------------- batches


class Pooled(nn.Module):
    """Averages over the image, so nothing in its graph but the guards tells the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()
        self.last = nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner.second(self.inner.body(images)).mean(dim=(2, 3)))


@pytest.mark.parametrize("batch", [1, 4])
def test_batch_size_written_in_the_guards_alone_does_not_bind(load: Load, batch: int) -> None:
    network = load(Pooled(), batch=batch)
    assert network.batch_size is None
    assert_same_answers(subject_of(network), Pooled(), pictures(7))


def test_free_batch_stays_free(load: Load) -> None:
    network = load(Tiny())
    assert network.batch_size is None
    assert_same_answers(subject_of(network), Tiny(), pictures(7))


class Insisting(nn.Module):
    """Reshapes to the batch size of its example, as traced code often does."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.inner = Tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.inner.second(self.inner.body(images))
        return self.inner.head(features.view(self.batch, -1))


class Shifting(nn.Module):
    """Adds another offset to each place of the batch, from a buffer as long as the batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.inner = Tiny()
        self.register_buffer("zeros", torch.zeros(batch, 3, SIZE, SIZE))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images + self.zeros)


@pytest.mark.parametrize("batch", [1, 4])
def test_graph_that_insists_on_its_batch_size_is_fed_with_it(load: Load, batch: int) -> None:
    network = load(Insisting(batch), batch=batch)
    assert network.batch_size == batch
    subject = subject_of(network)
    for count in (1, 4, 6):
        assert_same_answers(subject, Tiny(), pictures(count))


def test_buffer_as_long_as_the_batch_binds_it(load: Load) -> None:
    network = load(Shifting(4), batch=4)
    assert network.batch_size == 4
    assert_same_answers(subject_of(network), Tiny(), pictures(6))


def test_gradients_reach_the_pixels_through_a_fixed_batch(load: Load) -> None:
    module = subject_of(load(Insisting(4), batch=4)).torch_module()
    pixels = torch.rand(6, 3, SIZE, SIZE, requires_grad=True)
    module(pixels)[-1].sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


# ------------------------------------------------------------------------------------------------------ in-place


class Normalising(nn.Module):
    """Normalises its input, in place or not."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.inner = Tiny()
        self.in_place = in_place

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.sub_(0.45).div_(0.22) if self.in_place else (images - 0.45) / 0.22
        return self.inner(values)


class Overwriting(nn.Module):
    """Answers with the input, after it was overwritten."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).relu_().mul_(2.0)


class ShapedByItsBatch(nn.Module):
    """As many a ResNet for small images: its shortcut is padded, and what is left after pooling is viewed by the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = nn.functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 0, 1)) + self.convolution(images)
        features = nn.functional.avg_pool2d(features, features.size()[3])
        return self.head(features.view(features.size(0), -1))


def test_checking_a_program_leaves_its_batch_size_free(load: Load) -> None:
    network = load(ShapedByItsBatch())
    assert network.input_shape == (-1, 3, SIZE, SIZE)
    assert network.batch_size is None


@pytest.mark.parametrize("batch", [None, 4])
def test_a_model_that_normalises_in_place_does_not_change_the_pixels_it_is_given(load: Load, batch: int | None) -> None:
    subject = subject_of(load(Normalising(in_place=True), batch=batch))
    assert_same_answers(subject, Normalising(in_place=False), pictures(6))
    module, pixels = subject.torch_module(), torch.rand(4, 3, SIZE, SIZE)
    before = pixels.clone()
    first, again = module(pixels)[-1], module(pixels)[-1]
    torch.testing.assert_close(pixels, before, rtol=0, atol=0)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    module(pixels.requires_grad_())[-1].sum().backward()  # a leaf may not be written to
    assert pixels.grad is not None


def test_a_model_whose_answer_is_its_overwritten_input_still_answers_so(tmp_path: Path) -> None:
    program = torch.export.export(Overwriting(), (torch.rand(4, 3, 2, 2),), dynamic_shapes=({0: torch.export.Dim("n")},))
    pixels = torch.randn(5, 3, 2, 2)
    before = pixels.clone()
    answer = plain_graph(program)(pixels)
    torch.testing.assert_close(answer, before.flatten(1).relu() * 2, rtol=0, atol=0)
    torch.testing.assert_close(pixels, before, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------- weights


class Buffers(nn.Module):
    """Its weights are buffers, as quantised and converted models have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("kernel", torch.randn(4, 3, 3, 3))
        self.register_buffer("matrix", torch.randn(5, 4 * SIZE * SIZE) / 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(nn.functional.conv2d(images, self.kernel, padding=1))
        return nn.functional.linear(features.flatten(1), self.matrix)


class Constants(Buffers):
    """Its weights are plain tensors, neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        kernel, matrix = self.kernel, self.matrix
        del self.kernel, self.matrix
        self.kernel, self.matrix = kernel, matrix


@pytest.mark.parametrize("kind", [Buffers, Constants])
def test_weights_stored_otherwise_than_as_parameters_count_and_work(load: Load, kind: type[nn.Module]) -> None:
    network = load(kind())
    assert network.parameter_count == 4 * 3 * 9 + 5 * 4 * SIZE * SIZE
    subject = subject_of(network)
    assert len(subject.summary.taps) == 1
    assert_same_answers(subject, kind(), pictures(3))


@pytest.mark.parametrize(("kind", "value"), [(Tiny, torch.nan), (Buffers, torch.nan), (Constants, torch.nan), (Tiny, -torch.inf)])
def test_weights_that_are_not_finite_are_named(load: Load, kind: type[nn.Module], value: float) -> None:
    module = kind()
    with torch.no_grad():
        (module.head.weight if isinstance(module, Tiny) else module.matrix)[0, 0] = value
    with pytest.raises(SubjectError, match="NaN or infinite"):
        load(module)


class Masked(nn.Module):
    """Attention in which no place sees those after it: what it may not see has a score of minus infinity."""

    def __init__(self, *, constant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 5)
        mask = torch.full((16, 16), -torch.inf).triu(1)
        if constant:
            self.mask = mask
        else:
            self.register_buffer("mask", mask)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        seen = (tokens @ tokens.transpose(1, 2) + self.mask).softmax(dim=-1) @ tokens
        return self.head((tokens + seen).mean(dim=1))


@pytest.mark.parametrize("constant", [False, True], ids=["buffer", "constant"])
def test_a_mask_of_infinity_is_no_broken_weight(load: Load, constant: bool) -> None:
    assert_same_answers(subject_of(load(Masked(constant=constant))), Masked(), pictures(6))


def save_onnx(folder: Path, nodes: list[onnx.NodeProto], **stored: np.ndarray) -> Path:
    """A classifier that multiplies pixels with ``matrix``, and ends in ``nodes`` that make ``y`` of ``scores``."""
    weights = {"matrix": np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32), **stored}
    first = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "matrix"], ["scores"])]
    graph = helper.make_graph(
        [*first, *nodes],
        "classifier",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    return folder / "model.onnx"


MASK = np.array([[-np.inf, 0, 0, 0, 0]], np.float32)
HIDE = [
    helper.make_node("Identity", ["mask"], ["hidden"]),
    helper.make_node("Add", ["scores", "hidden"], ["masked"]),
    helper.make_node("Softmax", ["masked"], ["y"]),
]


def test_a_mask_of_infinity_in_an_onnx_model_is_no_broken_weight(tmp_path: Path) -> None:
    network = load_network(save_onnx(tmp_path, HIDE, mask=MASK), inspect(tmp_path))
    assert network.class_count == 5


@pytest.mark.parametrize(
    ("nodes", "stored"),
    [
        (HIDE, {"mask": MASK * np.float32(np.nan)}),
        (HIDE, {"mask": MASK, "matrix": np.full((12, 5), np.inf, np.float32)}),
        (
            [helper.make_node("Identity", ["scale"], ["copy"]), helper.make_node("Div", ["scores", "copy"], ["y"])],
            {"scale": np.array([np.inf, 1, 1, 1, 1], np.float32)},
        ),
    ],
    ids=["NaN in a mask", "infinite matrix", "infinite divisor"],
)
def test_onnx_weights_that_are_not_finite_are_named(
    tmp_path: Path, nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray]
) -> None:
    with pytest.raises(SubjectError, match="NaN or infinite"):
        load_network(save_onnx(tmp_path, nodes, **stored), inspect(tmp_path))


# ------------------------------------------------------------------------------------------- devices and precision


def exported_on(device: str, module: nn.Module, path: Path) -> Path:
    """The file that an export on this device writes, made without having one."""
    save_program(module, path)
    kind, _, index = device.partition(":")

    def rewritten(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
        target = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
            for name in old.namelist():
                new.writestr(zipfile.ZipInfo(name), change(name, old.read(name)))
        return target.getvalue()

    def moved(name: str, content: bytes) -> bytes:
        if name.endswith("sample_inputs/model.pt"):
            return rewritten(content, moved)
        if name.endswith("data.pkl"):
            return content.replace(b"X\x03\x00\x00\x00cpu", b"X" + len(device).to_bytes(4, "little") + device.encode())
        own = f'"type": "{kind}", "index": {index or "null"}'.encode()
        return content.replace(b'"type": "cpu", "index": null', own) if name.endswith(".json") else content

    path.write_bytes(rewritten(path.read_bytes(), moved))
    return path


@pytest.mark.parametrize("device", ["cuda:0", "cuda:3", "mps"])
def test_a_program_that_was_exported_on_a_gpu_is_loaded_onto_the_cpu(tmp_path: Path, device: str) -> None:
    class Placing(Tiny):
        """Says where something lies in the graph, too, and not only in its weights."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) + torch.zeros(5, device=images.device) + torch.ones(5).to(images.device)

    path = exported_on(device, Placing(), tmp_path / "model.pt2")
    content = path.read_bytes()
    assert b'"cpu"' not in content
    network = load_network(path, inspect(tmp_path))
    assert {value.device.type for value in network.program.state_dict().values()} == {"cpu"}
    assert_same_answers(subject_of(network), Placing(), pictures(3))
    assert path.read_bytes() == content


class Converted(nn.Module):
    """Answers in another type of numbers."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.inner = Tiny()
        self.kind = kind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images).to(self.kind)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_program_that_takes_images_in_another_precision_is_told_the_way_out(tmp_path: Path, kind: torch.dtype) -> None:
    example = torch.rand(4, 3, SIZE, SIZE, dtype=kind)
    torch.export.save(torch.export.export(Tiny().to(kind).eval(), (example,)), tmp_path / "model.pt2")
    name = str(kind).removeprefix("torch.")
    with pytest.raises(SubjectError, match=rf"takes images in {name}, and only float32 can be audited\. Call model\.float\(\)"):
        load_network(tmp_path / "model.pt2", inspect(tmp_path))


class Casting(nn.Module):
    """Computes in bfloat16 what it takes and answers in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(images).float()


@pytest.mark.parametrize("module", [Converted(torch.bfloat16), Casting()], ids=["answer", "autocast"])
def test_a_program_that_computes_in_a_precision_that_no_array_has_is_told_the_way_out(load: Load, module: nn.Module) -> None:
    with pytest.raises(SubjectError, match=r"computes in bfloat16, and only float32 can be audited\. Call model\.float\(\)"):
        load(module)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_a_program_that_answers_in_another_precision_is_audited(load: Load, kind: torch.dtype) -> None:
    assert_same_answers(subject_of(load(Converted(kind))), Converted(kind), pictures(3))


# --------------------------------------------------------------------------------------------------------- shapes


def test_grey_images_of_odd_size_work(load: Load) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    network = load(module, shape=(1, 9, 13))
    assert network.input_shape[1:] == (1, 9, 13)
    assert_same_answers(subject_of(network), module, pictures(3, (1, 9, 13)))


@pytest.mark.parametrize("classes", [2, 1000])
def test_from_two_to_a_thousand_classes_work(load: Load, classes: int) -> None:
    network = load(Tiny(classes=classes))
    assert network.class_count == classes
    assert_same_answers(subject_of(network), Tiny(classes=classes), pictures(3))


@pytest.mark.parametrize(("classes", "words"), [(1, "regression"), (1001, "at most 1000")])
def test_fewer_or_more_classes_are_refused(load: Load, classes: int, words: str) -> None:
    with pytest.raises(SubjectError, match=words):
        load(Tiny(classes=classes))


class LastChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images.permute(0, 3, 1, 2))


def test_channels_last_input_is_recognised(load: Load) -> None:
    subject = subject_of(load(LastChannels(), shape=(SIZE, SIZE, 3)))
    assert subject.summary.input_spec.layout == "NHWC"
    assert_same_answers(subject, Tiny(), pictures(3))


# ---------------------------------------------------------------------------------------------------------- answers


class Divided(nn.Module):
    """Ends in probabilities that are a softmax's, but for torch and ONNX come from a division."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raised = self.inner(images).exp()
        return raised / raised.sum(dim=1, keepdim=True)


ENDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "softmax": lambda inner: nn.Sequential(inner, nn.Softmax(dim=1)),
    "softmax, then another shape": lambda inner: nn.Sequential(
        inner, nn.Unflatten(1, (5, 1, 1)), nn.Softmax(dim=1), nn.Dropout(), nn.Flatten()
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_last_softmax_is_taken_of_are_the_logits(load: Load, end: str) -> None:
    network = load(ENDS[end](Tiny()))
    assert network.gives_probabilities
    subject = subject_of(network)
    assert_same_answers(subject, Tiny(), pictures(6))
    check_parity(subject, pictures(6))
    assert not subject.may_hide_scores
    assert subject.summary.taps == subject_of(load(nn.Sequential(Tiny()))).summary.taps


def test_a_class_that_a_softmax_makes_impossible_still_has_a_gradient(load: Load) -> None:
    """One class's score far below the others': its probability is zero in float32, so the logarithm of it would be flat."""
    inner = Tiny()
    with torch.no_grad():
        inner.head.bias[2] -= 1000.0
    module = subject_of(load(nn.Sequential(inner, nn.Softmax(dim=1)))).torch_module()
    pixels = torch.rand(4, 3, SIZE, SIZE, requires_grad=True)
    module(pixels)[-1][:, 2].sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.flatten(1).abs().amax(dim=1) > 0).all()


def test_other_probabilities_become_logits_by_their_logarithm_and_may_hide_scores(load: Load) -> None:
    network = load(Divided(Tiny()))
    assert network.gives_probabilities
    images = pictures(6)
    subject = subject_of(network)
    expected = answers(Tiny(), images)
    expected = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(subject.logits(images), expected, rtol=1e-3, atol=1e-4)
    check_parity(subject, images)
    assert subject.may_hide_scores


def test_logits_are_not_taken_for_probabilities(load: Load) -> None:
    assert not load(Tiny()).gives_probabilities


class Answering(nn.Module):
    """Answers in the form that ``answer`` gives to the logits."""

    def __init__(self, answer: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.inner = Tiny()
        self.answer = answer

    def forward(self, images: torch.Tensor) -> object:
        return self.answer(self.inner(images))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda logits: {"logits": logits, "features": logits * 2}, "Wrap it"),
        (lambda logits: {"logits": logits}, "in a dict. Wrap it"),
        (lambda logits: (logits, logits * 2), "Wrap it"),
        (lambda logits: (logits,), "in a tuple. Wrap it"),
        (lambda logits: logits.argmax(dim=1), "one row of class scores an image"),
        (lambda logits: logits[:, :, None, None], "one row of class scores an image"),
        (lambda logits: logits[:, :1], "regression"),
        (lambda logits: logits / 0, "NaN or infinity"),
    ],
    ids=["dict", "dict of one", "tuple", "tuple of one", "labels", "map", "one number", "infinity"],
)
def test_answer_that_is_no_row_of_scores_is_refused(load: Load, answer: Callable[[torch.Tensor], object], words: str) -> None:
    with pytest.raises(SubjectError, match=words):
        load(Answering(answer))


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, images: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
            return (images + more).mean(dim=(2, 3))

    example = torch.rand(4, 3, SIZE, SIZE)
    torch.export.save(torch.export.export(Two(), (example, example)), tmp_path / "model.pt2")
    with pytest.raises(SubjectError, match="2 inputs"):
        load_network(tmp_path / "model.pt2", inspect(tmp_path))


def test_damaged_program_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(IntakeError, match=r"model\.pt2") as caught:
        load_network(tmp_path / "model.pt2", Intake("pt2", "model.pt2", None))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- training mode


class Otherwise(nn.Module):
    """Puts one more layer before the classifier of :class:`Tiny`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = Tiny()
        self.inner.body[1] = nn.Identity()
        self.layer = layer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(self.layer(images))


class Frozen(nn.Module):
    """Runs what it holds without gradients, which the exporter puts into a graph of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            answer = self.inner(images)
        return answer * 2


def load_in_training_mode(module: nn.Module, folder: Path, *, rewritten: bool = False) -> Network:
    program = torch.export.export(module.train(), (torch.rand(4, 3, SIZE, SIZE),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program.run_decompositions({}) if rewritten else program, folder / "model.pt2")
    return load_network(folder / "model.pt2", inspect(folder))


@pytest.mark.parametrize("rewritten", [False, True], ids=["as exported", "rewritten"])
@pytest.mark.parametrize(
    "module",
    [
        Tiny(),
        Otherwise(nn.BatchNorm2d(3)),
        Otherwise(nn.Dropout(0.3)),
        Otherwise(nn.RReLU()),
    ],
    ids=["network", "batch norm", "dropout", "rrelu"],
)
def test_program_exported_in_training_mode_says_so(module: nn.Module, tmp_path: Path, rewritten: bool) -> None:
    with pytest.raises(SubjectError, match=r"exported in training mode.*model\.eval\(\) before logging it again"):
        load_in_training_mode(module, tmp_path, rewritten=rewritten)


@pytest.mark.parametrize("layer", [nn.Dropout2d(0.3), nn.AlphaDropout(0.3), nn.FeatureAlphaDropout(0.3)])
def test_dropout_of_every_kind_is_recognised(layer: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="exported in training mode"):
        load_in_training_mode(Otherwise(layer), tmp_path)


def test_training_mode_in_an_inner_graph_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(SubjectError, match="exported in training mode"):
        load_in_training_mode(Frozen(Tiny()), tmp_path)


def test_dropout_of_nothing_is_no_reason_to_refuse(tmp_path: Path) -> None:
    assert load_in_training_mode(Otherwise(nn.Dropout(0.0)), tmp_path).class_count == 5


def test_batch_statistics_of_a_model_in_evaluation_are_no_reason_to_refuse(load: Load) -> None:
    # Such a model is refused later where it must be; it was not exported in the wrong mode.
    assert load(Otherwise(nn.BatchNorm2d(3, track_running_stats=False))).class_count == 5


# ----------------------------------------------------------------------------------------------------- state_dicts


@pytest.fixture
def resnet(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    return module, tmp_path


def load_weights(folder: Path, **policy: object) -> Network:
    model = ModelPolicy(**policy)  # type: ignore[arg-type]
    classes = len(model.classes) if model.classes else None
    shape = open_shape(model)
    intake = inspect(folder)
    return load_network(
        folder / intake.data_path, intake, architecture=model.architecture, class_count=classes, input_shape=shape
    )


IMAGE = {"height": 32, "width": 32, "channels": 3}


def test_state_dict_with_its_architecture_loads(resnet: tuple[nn.Module, Path]) -> None:
    module, folder = resnet
    network = load_weights(folder, architecture="resnet18", **IMAGE)
    assert network.class_count == 7
    assert_same_answers(subject_of(network), module, pictures(3, (3, 32, 32)))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (IMAGE, "architecture"),
        ({"architecture": "resnet81", **IMAGE}, "Did you mean 'resnet18'"),
        (
            {"architecture": "vgg11", **IMAGE},
            r"does not fit torchvision's vgg11 with 7 classes: 22 missing \('features.0.weight', 'features.0.bias', "
            r"'features.3.weight', \.\.\.\); 122 unknown \('conv1.weight', .*Check \[model\] architecture and classes",
        ),
        (
            {"architecture": "resnet18", "classes": ("cat", "dog"), **IMAGE},
            r"with 2 classes: 2 of another shape \('fc.weight' has \(7, 512\) instead of \(2, 512\), 'fc.bias' has \(7,\) "
            r"instead of \(2,\)\)\. Check",
        ),
        ({"architecture": "resnet18"}, "height, width and channels"),
        ({"architecture": "resnet18", **IMAGE, "channels": 1}, r"resnet18 does not take images of shape \(1, 32, 32\)"),
    ],
)
def test_state_dict_that_lacks_something_says_what(resnet: tuple[nn.Module, Path], policy: dict[str, object], words: str) -> None:
    with pytest.raises(AuditError, match=words) as caught:
        load_weights(resnet[1], **policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [None, ("cat", "dog")])
@pytest.mark.parametrize("key", ["state_dict", "model", 7])
def test_a_checkpoint_around_a_state_dict_is_recognised(
    resnet: tuple[nn.Module, Path], key: str | int, classes: tuple[str, ...] | None
) -> None:
    module, folder = resnet
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: module.state_dict()}, folder / "weights.pth")
    with pytest.raises(SubjectError, match=rf"a whole checkpoint.*Save them alone: torch\.save\(checkpoint\[{key!r}\], path\)"):
        load_weights(folder, architecture="resnet18", classes=classes, **IMAGE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.model."])
def test_names_that_all_begin_alike_are_recognised_as_those_of_a_wrapped_model(
    resnet: tuple[nn.Module, Path], prefix: str
) -> None:
    module, folder = resnet
    torch.save({prefix + name: value for name, value in module.state_dict().items()}, folder / "weights.pth")
    with pytest.raises(SubjectError, match=f"All names begin with '{prefix}'.*Save the state_dict of the model inside"):
        load_weights(folder, architecture="resnet18", **IMAGE)


@pytest.mark.parametrize("rows", [0, 1, 1001, 2**30])
def test_a_last_layer_of_no_number_of_classes_is_refused_before_a_network_is_made(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", pytest.fail)
    torch.save({"fc.weight": torch.zeros(1).expand(rows, 2)}, tmp_path / "weights.pth")
    with pytest.raises(SubjectError, match=f"has {rows} rows, and a classifier has 2 to 1000 classes"):
        load_weights(tmp_path, architecture="resnet18", **IMAGE)


def test_state_dict_whose_keys_are_no_text_is_refused(tmp_path: Path) -> None:
    torch.save({1: torch.zeros(3, 3), "b": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(AuditError, match="does not fit torchvision's resnet18"):
        load_weights(tmp_path, architecture="resnet18", **IMAGE)


# ------------------------------------------------------------------------------------------------------------ ONNX


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_onnx_model_has_the_taps_and_answers_of_the_torch_one(tmp_path: Path, batch: int | None) -> None:
    program = torch.export.export(
        Tiny().eval(), (torch.rand(batch or 4, 3, SIZE, SIZE),), dynamic_shapes=None if batch else ({0: torch.export.Dim("n")},)
    )
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    exported.save(tmp_path / "model.onnx")
    network = load_network(tmp_path / "model.onnx", inspect(tmp_path))
    assert isinstance(network.program, onnx.ModelProto)
    assert network.batch_size == batch
    subject = subject_of(network)
    assert len(subject.summary.taps) == 2
    assert_same_answers(subject, Tiny(), pictures(6))


@pytest.mark.parametrize(
    ("element", "high", "tolerance"),
    [(TensorProto.UINT8, 255.0, 1e-6), (TensorProto.INT32, 255.0, 1e-6), (TensorProto.FLOAT16, 1.0, 5e-3)],
)
def test_onnx_models_of_other_inputs_than_float32_answer_as_they_do_themselves(
    element: int, high: float, tolerance: float, tmp_path: Path
) -> None:
    """Half precision is compared with half precision, rounded at other places: 11 bits, a few operations."""
    computed = element if element == TensorProto.FLOAT16 else TensorProto.FLOAT
    kind = helper.tensor_dtype_to_np_dtype(computed)
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.normal(size=(4, 3, 3, 3)) * 0.1).astype(kind), "kernels"),
        numpy_helper.from_array(rng.normal(size=(4 * SIZE * SIZE, 5)).astype(kind), "matrix"),
    ]
    nodes = [
        helper.make_node("Cast", ["images"], ["values"], to=computed),
        helper.make_node("Conv", ["values", "kernels"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["features"]),
        helper.make_node("Flatten", ["features"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("images", element, ["n", 3, SIZE, SIZE])
    answer = helper.make_tensor_value_info("logits", computed, ["n", 5])
    graph = helper.make_graph(nodes, "classifier", [given], [answer], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")
    network = load_network(tmp_path / "model.onnx", inspect(tmp_path))
    assert example_input(network).dtype == helper.tensor_dtype_to_np_dtype(element)
    with pytest.raises(ExportError, match="A guard takes float32, and this model takes "):
        guarded_model(network, pytest.fail, 0.0)
    spec = InputSpec(SIZE, SIZE, 3, high=high)
    subject = prepare_subject(network, spec, flavour="onnx", class_names=tuple("abcde"))
    images = rng.integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    own = images.transpose(0, 3, 1, 2) * (high / 255.0)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (expected,) = session.run(None, {"images": own.astype(helper.tensor_dtype_to_np_dtype(element))})
    np.testing.assert_allclose(subject.logits(images), expected.astype(np.float32), atol=tolerance * np.abs(expected).max())


def test_onnx_models_that_take_text_are_told_what_an_image_is(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["images"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["values"], ["y"]),
    ]
    given = helper.make_tensor_value_info("images", TensorProto.STRING, ["n", 3, 2, 2])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 12])
    graph = helper.make_graph(nodes, "reader", [given], [answer])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")
    with pytest.raises(AuditError, match="STRING"):
        load_network(tmp_path / "model.onnx", inspect(tmp_path))
