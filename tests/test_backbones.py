"""Views of a clip are what their names say, networks see it as often as documented, in both precisions; faults have names."""

import dataclasses
import functools
import itertools
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from conclugen_jax.extract import backbones, prediction, preparation
from conclugen_jax.extract.backbones import Backbone, Networks, Options, View
from conclugen_jax.extract.media import augmentation, decoding as media, mel
from conclugen_jax.extract.media.clip import SAMPLE_RATE, Clip
from conclugen_jax.extract.networks import davenet, resnet, weights
from conclugen_jax.extract.utterance import Utterance
from conclugen_jax.extract.vectors import vectors
from tests import clips
from tests.test_networks import TOKENIZER, write_text

SIDE, RATE = 32, 16.0
TEXT = "i am very happy today am i very sad today i am happy very happy i am sad today i am very sad"
MODALITIES = ("video", "audio", "text")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(TOKENIZER)
    return path


@pytest.fixture(scope="module")
def functions(tokenizer):
    """What prepares each modality."""
    return {
        "video": functools.partial(backbones.frames, rate=RATE, size=SIDE),
        "audio": functools.partial(backbones.spectrogram, front_end="published"),
        "text": functools.partial(backbones.tokens, path=str(tokenizer), max_tokens=64),
    }


def still(count=20):
    """A clip of one picture throughout, an array of its own for each frame; noise; words."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    sound = rng.normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
    return Clip([picture.copy() for _ in range(count)], np.arange(count) / RATE, RATE, sound, text=TEXT)


def view(number=1, strength="strong", clip="train/anna"):
    return View(5, clip, number, strength)


def draw(modality, number=1, clip="train/anna", seed=5):
    """Random numbers of a view, drawn without its help."""
    return View(seed, clip, number).generator(modality)


def filled_up(spectrogram):
    """[frames, mels] -> one item, zeros behind it."""
    length = -(-len(spectrogram) // backbones.LENGTHS) * backbones.LENGTHS
    filled = np.zeros((1, length, spectrogram.shape[1]), np.float32)
    filled[0, : len(spectrogram)] = spectrogram
    return filled


def same(one, other):
    return all(a.shape == b.shape and np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("modality", MODALITIES)
def test_views_of_a_clip_differ(functions, modality):
    views = [functions[modality](still(), each) for each in (None, view(1), view(2), view(3))]
    assert not any(same(a, b) for a, b in itertools.combinations(views, 2))


@pytest.mark.parametrize("modality", MODALITIES)
def test_views_of_clips_of_other_names_differ(functions, modality):
    anna, again, ben = (functions[modality](still(), view(clip=name)) for name in ("anna", "anna", "ben"))
    assert same(anna, again)
    assert not same(anna, ben)


def test_without_a_view_a_clip_is_as_it_is(functions, tokenizer):
    clip = still()
    (pictures,) = functions["video"](clip, None)
    np.testing.assert_array_equal(pictures, np.stack(clip.frames))
    heard = mel.FRONT_ENDS["published"][0](clip.sound)
    found, lengths = functions["audio"](clip, None)
    np.testing.assert_array_equal(found, filled_up(heard))
    assert lengths.tolist() == [len(heard)]
    tokens, real = functions["text"](clip, None)
    assert tokens[real].tolist() == Tokenizer.from_file(str(tokenizer)).encode(TEXT).ids


@pytest.mark.parametrize("prepare", [backbones.frames, functools.partial(backbones.frames, window=16)])
def test_all_frames_of_a_view_are_changed_alike(prepare):
    clip = still(40)
    (found,) = prepare(clip, view(), rate=RATE, size=SIDE)
    pictures = found.reshape(-1, SIDE, SIDE, 3)
    assert len(pictures) >= 40
    np.testing.assert_array_equal(pictures, np.broadcast_to(pictures[:1], pictures.shape))
    assert not np.array_equal(pictures[0], clip.frames[0])


@pytest.mark.parametrize("strength", augmentation.STRENGTHS)
@pytest.mark.parametrize("number", [1, 2])
def test_pictures_are_changed_as_strongly_as_the_view_says(functions, strength, number):
    clip = still(3)
    change = augmentation.draw_pictures(draw("video", number), augmentation.STRENGTHS[strength])
    (found,) = functions["video"](clip, view(number, strength))
    np.testing.assert_array_equal(found, np.stack([change.apply(frame) for frame in clip.frames]))


def test_strengths_differ(functions):
    mild, strong = (functions["video"](still(3), view(strength=strength)) for strength in ("mild", "strong"))
    assert not same(mild, strong)


@pytest.mark.parametrize("front_end", mel.FRONT_ENDS)
def test_sound_of_a_view_is_masked(front_end):
    clip = still()
    found, lengths = backbones.spectrogram(clip, view(), front_end=front_end)
    heard = mel.FRONT_ENDS[front_end][0](clip.sound)
    changed = augmentation.change_sound(heard, draw("audio"))
    np.testing.assert_array_equal(found, filled_up(changed))
    assert lengths.tolist() == [len(heard)]
    assert not np.array_equal(found, filled_up(heard))


def test_words_of_a_view_are_changed(functions, tokenizer):
    changed = augmentation.change_text(TEXT, draw("text"))
    assert changed != TEXT
    tokens, real = functions["text"](still(), view())
    assert tokens[real].tolist() == Tokenizer.from_file(str(tokenizer)).encode(changed).ids


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """One second of changing pictures with a tone."""
    path = tmp_path_factory.mktemp("films") / "a.mkv"
    return clips.write(path, clips.steady(1.0), height=SIDE, width=SIDE, sound=clips.tone(1.0))


def views_of(film, functions, name="anna", num_views=2, **options):
    """Items of each view of a clip under a name, as worker processes prepare them."""
    made = [Backbone(m, m, 1, run, None, RATE if m == "video" else 0.0) for m, run in functions.items()]
    how = preparation.recipe(made, num_views=num_views, **options)
    found = preparation.prepare(Utterance(name, "train", str(film), text=TEXT), how, num_views)
    assert not found.failure
    assert all(items.keys() == set(MODALITIES) for items in found.views)
    return found.views


def test_copies_of_a_clip_under_two_names_have_other_views(film, functions):
    anna, again, ben = (views_of(film, functions, name) for name in ("anna", "anna", "ben"))
    for modality in MODALITIES:
        assert same(anna[0][modality], ben[0][modality])
        assert same(anna[1][modality], again[1][modality])
        assert not same(anna[1][modality], ben[1][modality])


@pytest.mark.parametrize("strength", augmentation.STRENGTHS)
def test_views_follow_from_seed_name_number_and_strength(film, functions, strength):
    clip = dataclasses.replace(media.decode(film, rates=(RATE,)), text=TEXT)
    found = views_of(film, functions, num_views=4, seed=7, strength=strength)
    for number, each in enumerate(found):
        expected = View(7, "train/anna", number, strength) if number else None
        assert all(same(each[modality], run(clip, expected)) for modality, run in functions.items())
    for one, other in itertools.combinations(found, 2):
        assert not any(same(one[modality], other[modality]) for modality in MODALITIES)


def randomly(module, *example):
    """Variables of a module: numbers at which activations neither vanish nor grow."""
    rng = np.random.default_rng(0)

    def numbers(leaf):
        size = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if len(leaf.shape) > 1 else 0.1
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(size)

    return jax.tree.map(numbers, jax.eval_shape(module.init, jax.random.key(0), *example)["params"])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Random weights of networks by their names, made once each."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def make(network):
        options = {}
        if network == "text":
            weights.convert("text", write_text(folder / "published", "roberta"), folder / "text")
            return weights.load(folder / "text")
        if network == "resdavenet":
            options = {"widths": [16, 16, 32, 64, 128], "kernel_mels": 40}
            params = randomly(davenet.ResDAVEnet(**options), *sounds(64))
        elif network == "resnet3d18":
            params = randomly(resnet.ResNet(18, *backbones.KINETICS), pictures(1, backbones.WINDOW)[0])
        else:
            params = randomly(resnet.ResNet(18, *backbones.IMAGENET), pictures(1)[0])
        return weights.Weights(network, options, params, "", {}, Path())

    return make


def pictures(*lengths):
    return (np.random.default_rng(1).integers(0, 256, (*lengths, SIDE, SIDE, 3), dtype=np.uint8),)


def sounds(length):
    """Four sounds, the first of them so many frames long."""
    filled = np.random.default_rng(2).normal(size=(4, length, 40)).astype(np.float32)
    return filled, np.array([length, length // 2, length // 3, 1], np.int32)


def words():
    """Eight texts of one to eight tokens."""
    tokens = np.random.default_rng(3).integers(4, 10, (8, 8)).astype(np.int32)
    return tokens, np.arange(8)[None] <= np.arange(8)[:, None]


def test_the_authors_normalisation_is_of_2d_networks_alone(loaded):
    for network, mean, std in (("resnet18", *backbones.IMAGENET[::-1]), ("resnet3d18", *backbones.KINETICS)):
        backbone = backbones.create(loaded(network), Options(size=SIDE, authors_normalisation=True))
        assert (backbone.provenance["mean"], backbone.provenance["std"]) == (list(mean), list(std))


def numbered(seconds):
    """A clip whose frames are as grey as their numbers say."""
    count = round(seconds * RATE)
    frames = [np.full((SIDE, SIDE, 3), i, np.uint8) for i in range(count)]
    return Clip(frames, np.arange(count) / RATE, RATE, None)


@pytest.mark.parametrize(("network", "rate"), [("resnet18", 1), ("resnet3d18", 16)])
def test_frames_are_seen_as_often_as_documented(loaded, network, rate):
    backbone = backbones.create(loaded(network), Options(size=SIDE))
    assert backbone.rate == backbone.provenance["frames_per_second"] == rate
    assert backbone.provenance.get("window") == (16 if "3d" in network else None)
    (found,) = backbone.prepare(numbered(3.0), None)
    assert found.shape[1:] == ((16,) if "3d" in network else ()) + (SIDE, SIDE, 3)
    assert found[..., 0, 0, 0].ravel().tolist() == list(range(0, 48, 16 // rate))


@pytest.mark.parametrize(("network", "tolerance"), [("resnet3d18", 0.03), ("resdavenet", 0.01), ("text", 0.02)])
def test_bfloat16_of_every_network_is_near(loaded, network, tolerance):
    inputs = {"resnet3d18": pictures(1, backbones.WINDOW), "resdavenet": sounds(2000), "text": words()}[network]
    exact, near = (
        backbones.create(loaded(network), Options(size=SIDE, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert (exact.provenance["precision"], near.provenance["precision"]) == ("float32", "bfloat16")
    expected, found = (np.asarray(backbone.vectors(*inputs)) for backbone in (exact, near))
    assert found.dtype == expected.dtype == np.float32
    assert 1e-5 < np.abs(found - expected).max() / np.abs(expected).max() < tolerance


def test_means_over_time_are_taken_in_float32(loaded):
    made = loaded("resdavenet")
    module, last = davenet.ResDAVEnet(**made.options, dtype=jnp.bfloat16), "layer4_1"
    run = jax.jit(functools.partial(module.apply, capture_intermediates=lambda each, _: each.name == last))
    found, state = run({"params": made.params}, *sounds(2000))
    ((maps, lengths),) = state["intermediates"][last]["__call__"]
    assert maps.dtype == jnp.bfloat16
    maps = np.asarray(maps, np.float64)
    expected = [x[:, :length].mean(axis=(0, 1)) for x, length in zip(maps, lengths.tolist(), strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def prepared(place, values):
    """An utterance of two backbones; each number is that of a view of the first."""
    views = [{"odd": (np.full((1, 3), x, np.float32),), "good": (np.ones((1, 2), np.float32),)} for x in values]
    return preparation.Prepared(place, tuple(views))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_of_any_view_that_are_not_finite_are_a_failure_of_their_backbone(number, value):
    networks = [Backbone(name, "video", dim, None, lambda x: x) for name, dim in (("odd", 3), ("good", 2))]
    values = [1.0, 2.0, 3.0]
    values[number] = value
    both = iter([prepared("a", values), prepared("b", [1.0, 2.0, 3.0])])
    found = {each.place: (each.failure, joined) for each, joined in vectors(both, networks)}
    assert found["a"][0].startswith("a: odd gave numbers that are not finite")
    assert found["a"][1] == {}
    assert found["b"][0] == ""
    assert found["b"][1]["video"].tolist() == [[x, x, x, 1, 1] for x in (1, 2, 3)]


def test_a_vector_is_the_mean_over_all_items_of_its_clip():
    rng = np.random.default_rng(0)
    items = {name: rng.normal(size=(count, 3)).astype(np.float32) for name, count in (("a", 20), ("b", 3), ("c", 9))}
    doubling = Backbone("same", "video", 3, None, lambda x: 2 * x, batch_size=4)
    clips_of = [preparation.Prepared(name, ({"same": (rows,)},)) for name, rows in items.items()]
    found = {each.place: joined["video"][0] for each, joined in vectors(iter(clips_of), [doubling])}
    for name, rows in items.items():
        np.testing.assert_allclose(found[name], 2 * rows.astype(np.float64).mean(axis=0), rtol=1e-5, atol=1e-6)


OWN = Networks((), ("tests.own_backbones:pictures",))


def facts(networks=OWN, **options):
    """What a data set of one backbone of the tests' own says of its extraction."""
    found = backbones.load(networks)
    how = preparation.recipe(found, size=networks.options.size, **options)
    return json.loads(json.dumps(preparation.provenance(found, how, networks.options).to_json()))


def test_other_views_are_told_apart():
    told = [
        facts(num_views=1),
        facts(num_views=2),
        facts(num_views=3),
        facts(num_views=3, seed=1),
        facts(num_views=3, seed=1, strength="mild"),
    ]
    assert all(a != b for a, b in itertools.combinations(told, 2))
    assert facts(num_views=1, seed=1, strength="mild") == told[0]
    assert facts(num_views=3) == told[2]


def test_a_prediction_has_the_options_of_the_data_set(monkeypatch):
    options = Options(size=112, precision="bfloat16", front_end="authors", authors_normalisation=True)
    made = types.SimpleNamespace(name="mine", source={"extraction": facts(dataclasses.replace(OWN, options=options))})
    asked, load = [], backbones.load
    monkeypatch.setattr(backbones, "load", lambda networks: asked.append(networks.options) or load(networks))
    _, how = prediction._same_way(made, "runs/linear", ["video"], OWN, "", Path())
    assert how.size == options.size
    assert asked == [options]
