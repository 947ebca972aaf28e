"""Others' networks as T and S0: every kind of pair trains, and runs go on to ONNX."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
import torchvision
from preparing import facts_of
from torch import nn

from rkd_deploy.data.sources import load_images
from rkd_deploy.errors import CheckpointError, DataError, RecipeError, UsageError
from rkd_deploy.models import zoo
from rkd_deploy.models.cost import count, count_head
from rkd_deploy.models.residual import ResidualStudent
from rkd_deploy.models.staged import FeatureNetwork
from rkd_deploy.pipeline import export_run
from rkd_deploy.recipe import MethodRecipe
from rkd_deploy.recipe.method import BASE_LOSSES
from rkd_deploy.train.checkpoints import load_checkpoint
from rkd_deploy.train.fitting import fit, resume
from rkd_deploy.train.methods import base_loss
from rkd_deploy.train.methods.baseline import Distilled
from rkd_deploy.train.methods.end_to_end import EndToEnd, Weights
from rkd_deploy.train.methods.residual import AssistantStep, StudentStep, mse
from rkd_deploy.train.networks import build_residual, load_part

K, SIZE = 4, 32
# Last maps of 8x8, 1x1, 2x2 and 1x1; 3, 5, 1 and 4 stages: each is T once and S once, with fewer stages and with more.
PAIRS = (
    ("timm:test_resnet", "resnet8"),
    ("resnet8", "timm:test_resnet"),
    ("timm:test_vit", "timm:test_convnext"),
    ("timm:test_convnext", "timm:test_vit"),
)
# A run of a few steps at a size that networks for photos bear.
FEW = ("data.image_size=32", "data.train_limit=20", "data.test_limit=10", "train.batch_size=10", "train.epochs=1")
WEIGHTS = Weights(feature=1.0, assistant=1.0, ce=1.0, student=1.0, step_decay=1.0)


def made(name: str) -> FeatureNetwork:
    return zoo.create(name, K, input_size=SIZE)


def losses_of_steps(method: nn.Module, steps: int = 5) -> list[float]:
    x_NCHW, y_N = torch.randn(4, 3, SIZE, SIZE), torch.arange(4) % K
    learnt = [parameter for parameter in method.train().parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(learnt, lr=3e-3)
    values = []
    for _ in range(steps):
        total = method(x_NCHW, y_N).total
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        values.append(total.item())
    return values


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_pair_learns(teacher, student):
    T, S, A = made(teacher), made(student).without_head(), made(student).without_head()
    model = ResidualStudent(S, [A], T.channels, K)
    for method in (
        StudentStep(T, model, 1.0),
        AssistantStep(T, model, 1.0),
        EndToEnd(T, model, mse, WEIGHTS, detach=True, train_head=True),
    ):
        before = [parameter.clone() for parameter in T.parameters()]
        values = losses_of_steps(method)
        assert all(torch.tensor(values).isfinite()), values
        assert values[-1] < values[0], (type(method).__name__, values)
        assert all(torch.equal(weight, other) for weight, other in zip(before, T.parameters(), strict=True))


def test_unequal_maps_are_compared_at_the_smaller_size():
    x_NCHW, y_N = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    for teacher, student in (("timm:test_resnet", "resnet8"), ("resnet8", "timm:test_resnet")):
        T, S = made(teacher).eval(), made(student).without_head().eval()
        model = ResidualStudent(S, [made(student).without_head()], T.channels, K).eval()
        nn.init.normal_(model.assistant_adapters[0].norm.weight)
        with torch.no_grad():
            f_T, s, a = T.features(x_NCHW)[-1], model.student_map(x_NCHW), model.assistant_map(x_NCHW)
            size = min(f_T.shape[-1], s.shape[-1])
            f_T, s, a = (
                feature_map.unflatten(3, (size, -1)).unflatten(2, (size, -1)).mean((3, 5))
                for feature_map in (f_T, s, a)
            )
            assert StudentStep(T, model, 1.0, distance=mse).eval()(x_NCHW, y_N).total.item() == pytest.approx(
                (f_T - s).square().mean().item(), rel=1e-4
            )
            for method in (AssistantStep(T, model, 1.0, distance=mse),):
                assert method.eval()(x_NCHW, y_N).total.item() == pytest.approx(
                    (f_T - s - a).square().mean().item(), rel=1e-4
                )
            parts = EndToEnd(T, model, mse, WEIGHTS, detach=True, train_head=True).eval()(x_NCHW, y_N).parts
            assert parts["student"].item() == pytest.approx((f_T - s).square().mean().item(), rel=1e-4)
            assert parts["assistant"].item() == pytest.approx((f_T - s - a).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("teacher", "student", "loss"),
    [(*pair, loss) for pair in PAIRS[::2] for loss in BASE_LOSSES]
    + [(*pair, loss) for pair in PAIRS[1::2] for loss in ("at", "reviewkd")],  # what pairs stages, the other way round
)
def test_every_base_loss_between_networks_of_unlike_stages(teacher, student, loss):
    T, S0 = made(teacher), made(student)
    recipe = MethodRecipe(name=loss, **({"hint_stage": 1} if loss == "fitnet" else {}))
    values = losses_of_steps(Distilled(T, S0, base_loss(recipe, T, S0, (SIZE, SIZE)), 1.0))
    assert all(torch.tensor(values).isfinite()), values
    assert min(values[1:]) < values[0], values


def test_a_stage_that_is_not_there_is_refused():
    T, S0 = made("timm:test_vit"), made("resnet8")
    with pytest.raises(RecipeError, match="hint_stage = 2; T and S both have stages 1 to 1"):
        base_loss(MethodRecipe(name="fitnet"), T, S0, (SIZE, SIZE))


OWN = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.one, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.two, self.fc = nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, num_classes)
    def forward(self, x):
        return self.fc(self.two(self.bn(self.one(x)).relu()).relu().mean((2, 3)))
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "own_net:Net"
    sys.modules.pop("own_net", None)


@pytest.mark.parametrize("name", ["tv:squeezenet1_1", "timm:test_resnet", "own"])
def test_a_run_from_recipe_to_onnx(name, users_module, tiny_recipe, tmp_path):
    name = users_module if name == "own" else name
    recipe = tiny_recipe(*FEW, f"student.name={name}", "method.name=cross_entropy", "train.lr=0.01")
    run = fit(recipe, root=tmp_path / "runs")
    module = load_part(run, "s0")
    assert count(module, 32).macs == run.read_json("metrics.json")["parts"]["s0"]["macs"]
    assert run.read_json("facts.json")["student_stages"] == list(module.stages)
    exported = export_run(run)  # raises where ONNX Runtime answers otherwise than PyTorch
    assert (exported.folder / "model.onnx").is_file()

    run.metrics_path.unlink()  # as if killed before the end
    torch.testing.assert_close(load_part(resume(run), "s0").state_dict(), module.state_dict(), rtol=0, atol=0)


BROUGHT = "tests.support.networks"


@pytest.mark.parametrize("name", ["Tutorial", "Hidden"])
def test_networks_that_flatten_their_map(name, tiny_recipe, tmp_path):
    """Their heads are no function of the pooled map: they train and export, and T's head is refused with the reason."""
    network = f"{BROUGHT}:{name}"
    settings = (*FEW, "train.lr=0.01", f"teacher.name={network}", f"student.name={network}")
    room = ("student.round_to=4", "student.assistant_share=0.45")
    for method in ("cross_entropy", "kd"):
        export_run(fit(tiny_recipe(*settings, f"method.name={method}"), root=tmp_path / method))
    with pytest.raises(RecipeError, match=r'by T\'s head, .* a flattened map, .*Set method.head = "trained"'):
        fit(tiny_recipe(*settings, *room, "method.head=teacher"), root=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run = fit(tiny_recipe(*settings, *room, "method.head=trained"), root=tmp_path / "residual")
    for part in run.metrics.parts:
        export_run(run, part=part)


def test_every_part_of_a_block_that_is_called_twice_is_exported(tiny_recipe, tmp_path):
    """The parity gate's tolerance is 1e-4; folded twice, the block's batch norm is off by 2.5."""
    network = f"{BROUGHT}:Shared"
    settings = (f"teacher.name={network}", f"student.name={network}", "train.lr=0.01")
    run = fit(tiny_recipe(*FEW, *settings), root=tmp_path)
    for part in run.metrics.parts:
        assert export_run(run, part=part).proof.parity.max_abs_diff < 1e-4


def test_a_head_that_takes_a_root_is_refused_for_a_sum_that_has_a_sign(tiny_recipe, tmp_path):
    settings = (*FEW, "train.lr=1e-5", f"teacher.name={BROUGHT}:GeM", f"student.name={BROUGHT}:GeM")
    for head in ("teacher", "finetuned"):
        with pytest.raises(RecipeError, match=r'GeM is not defined for .*negative.*Set method\.head = "trained"'):
            fit(tiny_recipe(*settings, f"method.head={head}"), root=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    run = fit(tiny_recipe(*settings, "method.head=trained"), root=tmp_path)
    assert export_run(run).proof.differing == 0


def test_a_network_that_ends_in_probabilities_is_refused_before_training(tiny_recipe, tmp_path):
    with pytest.raises(UsageError, match="probabilities in place of logits: its last operation is a softmax"):
        fit(tiny_recipe(*FEW, f"teacher.name={BROUGHT}:Softmaxed"), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_state_dict_of_a_network_whose_child_has_a_prefix_s_name(tmp_path):
    network = zoo.build(f"{BROUGHT}:Wrapped", 10, (32, 32))
    torch.save(network.state_dict(), tmp_path / "own.pth")
    seen = zoo.create(f"{BROUGHT}:Wrapped", 10, input_size=32)
    loaded = load_checkpoint(tmp_path / "own.pth", wanted=seen.network.state_dict())
    seen.network.load_state_dict(loaded.state)
    torch.testing.assert_close(seen.network.state_dict(), network.state_dict(), rtol=0, atol=0)


def test_external_teacher_of_a_family(users_module, tiny_recipe, tmp_path):
    """A head that is more than a linear layer goes with S + A, is paid for, and is exported."""
    recipe = tiny_recipe(*FEW, "teacher.name=timm:test_convnext", "train.lr=0.01")
    run = fit(recipe, root=tmp_path)
    T, model = load_part(run, "teacher"), load_part(run, "fused")
    assert type(model.head) is type(T.fc)
    torch.testing.assert_close(model.head.state_dict(), T.fc.state_dict(), rtol=0, atol=0)
    account = run.facts.separation
    assert account.parts["head"] == count_head(T.fc, T.channels).macs
    assert count(model, 32).macs <= account.budget
    for level in ("sum", "tail"):
        export_run(run, level=level, folder=tmp_path / level)


def test_a_head_that_cannot_be_reused_is_refused_before_anything_is_computed(tiny_recipe, tmp_path):
    settings = (*FEW, "teacher.name=timm:test_vit")
    images = load_images(tiny_recipe(*settings).data, 0)
    for setting, message in (
        ("method.head=teacher", 'method.head = "teacher" classifies.*Set method.head = "trained"'),
        ("method.head=finetuned", 'method.head = "finetuned" classifies'),
        ("method.name=simkd", 'method.name = "simkd" classifies .* another teacher'),
    ):
        with pytest.raises(RecipeError, match=message):
            facts_of(tiny_recipe(*settings, setting), images)
    recipe = tiny_recipe(*settings, "method.head=trained")
    assert type(build_residual(recipe, facts_of(recipe, images)).head) is nn.Linear


def test_checkpoints_of_others_and_our_own_load(users_module, tiny_recipe, tmp_path):
    network = zoo.build(users_module, 10, (8, 8))
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    settings = (
        f"teacher.name={users_module}",
        "method.name=kd",
        "train.epochs=1",
        "data.val_fraction=0",
        "data.test_limit=10",
    )
    with pytest.raises(DataError, match="trained on other classes"):  # it loads, and its guesses are seen through
        fit(tiny_recipe(*settings, f"teacher.checkpoint={tmp_path / 'theirs.pth'}"), root=tmp_path / "runs")
    run = fit(tiny_recipe(*settings, "train.lr=0.1", "teacher.epochs=12"), root=tmp_path / "runs")
    shutil.copy(run.weights("teacher"), tmp_path / "ours.safetensors")
    again = fit(tiny_recipe(*settings, f"teacher.checkpoint={tmp_path / 'ours.safetensors'}"), root=tmp_path / "runs")
    first, other = (load_part(each, "teacher").state_dict() for each in (run, again))
    torch.testing.assert_close(first, other, rtol=0, atol=0)
    torch.save({"one.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match="is not a checkpoint of teacher own_net:Net"):
        fit(tiny_recipe(*settings, f"teacher.checkpoint={tmp_path / 'foreign.pth'}"), root=tmp_path / "runs")


def test_published_weights_are_what_training_begins_with(tiny_recipe, tmp_path, monkeypatch):
    """torchvision finds the file where it would have downloaded it to: all else is its own code and ours."""
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    source = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cached = tmp_path / "torch" / "hub" / "checkpoints" / weights.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(source, cached)

    settings = (*FEW, "teacher.name=tv:squeezenet1_1", "teacher.pretrained=true", "method.name=kd", "train.lr=1e-9")
    with pytest.raises(RecipeError, match=r"teacher tv:squeezenet1_1 expects .* mean \[0.485, 0.456, 0.406\]"):
        fit(tiny_recipe(*settings, "data.normalisation=data"), root=tmp_path / "runs")
    run = fit(tiny_recipe(*settings, "train.weight_decay=0"), root=tmp_path / "runs")
    assert (run.facts.mean, run.facts.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # taken by itself
    trained = load_part(run, "teacher").network.state_dict()
    classifier = {"classifier.1.weight", "classifier.1.bias"}  # of 1,000 classes there, of 10 here: fresh, and trained
    assert trained.keys() == source.keys()
    for key in source.keys() - classifier:
        torch.testing.assert_close(trained[key], source[key], rtol=0, atol=1e-6)
    assert trained["classifier.1.weight"].shape[0] == 10
