"""Method options: complete, validated, and without torch."""

import subprocess
import sys

import pytest

from pipeline.errors import UserError
from pipeline.methods.registry import METHODS, resolve_options, resolve_recipe
from pipeline.specs import Training


def test_options_are_read_without_importing_torch():
    code = (
        "import sys, pipeline.methods.registry as o; o.resolve_options('dino'); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_resolved_and_resolving_again_changes_nothing(name):
    options = resolve_options(name, {})
    assert set(options) == set(METHODS[name].options.model_fields)
    assert resolve_options(name, options) == options


@pytest.mark.parametrize("name", METHODS)
def test_recipe_holds_valid_training_settings(name):
    Training.model_validate(resolve_recipe(name, batch_size=64))


def test_preset_is_a_default_that_the_experiment_may_change():
    assert resolve_options("cass_vc")["regulariser"] == "variance_covariance"
    assert resolve_options("cass_vc", {"symmetric": False})["symmetric"] is False
    assert resolve_options("cass")["views"] == 1


def test_a_default_and_the_same_value_given_are_written_alike():
    given = resolve_options("cass_vc", {"invariance": 25})
    assert repr(given) == repr(resolve_options("cass_vc"))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("dinno", {}, "unknown method 'dinno', did you mean 'dino'?"),
        ("dino", {"out_dims": 3}, "method dino: unknown option 'out_dims', did you mean 'out_dim'?"),
        ("dino", {"out_dim": -1}, "method dino: option out_dim = -1: Input should be greater than"),
        ("simclr", {"temperature": "warm"}, "method simclr: option temperature = 'warm': Input should be"),
        ("cass", {"pairs": "cross+self"}, "method cass: pairs 'cross+self' needs views 2"),
        ("supervised", {"depth": 1}, "method supervised: unknown option 'depth' (it has none)"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(name, given, message):
    with pytest.raises(UserError) as error:
        resolve_options(name, given)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_learning_rate_scales_with_the_batch_where_the_recipe_says_so():
    assert resolve_recipe("dino", batch_size=1024)["lr"] == pytest.approx(4 * 5e-4)
    assert resolve_recipe("cass", batch_size=1024)["lr"] == 1e-3
    assert "lr_per_batch" not in resolve_recipe("dino", batch_size=64)


# Of the papers and their released code; for CASS the code (SWA over the last quarter, no weight decay).
PUBLISHED = {
    "cass": {"optimizer": "adam", "lr": 1e-3, "lr_min": 1e-6, "weight_decay": 0.0, "averaging": "swa"},
    "dino": {
        "lr": 5e-4 / 4,
        "warmup_epochs": 10,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "clip_grad": 3.0,
    },
    "hssl": {"lr": 7.5e-4 / 4, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 0.3},
    "scatsimclr": {"optimizer": "adam", "lr": 3e-4, "weight_decay": 1e-5, "clip_grad": None},
}
PUBLISHED["selfpatch"] = PUBLISHED["ibot"] = PUBLISHED["dino"]
PUBLISHED["hssl_ibot"] = PUBLISHED["hssl"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    found = resolve_recipe(name, batch_size=64)
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]
