"""The world: what is rendered is what the scene says, and the measures read it back."""

import numpy as np
import pytest
from pack.nano import measure, world


def scenes(count, **given):
    rng = np.random.default_rng(7)
    return [world.draw_scene(rng, **given) for _ in range(count)]


def observe(scene, frames=49):
    pixels = (world.render_frames(scene, frames) * 255 + 0.5).astype(np.uint8)
    return measure.observe(pixels, world.render_sound(scene, frames), world.SAMPLE_RATE)


@pytest.mark.parametrize("kind", world.KINDS)
def test_measures_read_back_what_a_scene_says(kind):
    for scene in scenes(6, kind=kind):
        seen = observe(scene)
        assert (seen.kind, seen.colour, seen.background) == (scene.kind, scene.colour, scene.background)


@pytest.mark.parametrize("kind", ["ball", "cube"])
def test_contacts_are_seen_and_heard_when_they_happen(kind):
    for scene in scenes(6, kind=kind, bounces=2):
        truth, seen = world.contacts(scene, 49 / world.FPS), observe(scene)
        assert len(truth) == len(seen.contacts) == len(seen.tones) == 2
        np.testing.assert_allclose(seen.contacts, truth, atol=0.04)
        np.testing.assert_allclose(seen.tones, truth, atol=0.04)


@pytest.mark.parametrize("kind", ["ball", "cube"])
def test_a_thing_lies_where_it_lands_long_enough_to_be_seen(kind):
    for scene in scenes(6, kind=kind, bounces=None):
        pixels = (world.render_frames(scene, 49) * 255 + 0.5).astype(np.uint8)
        *_, bottom = measure.extents(measure.masks(pixels)[1])
        for hit in world.contacts(scene, 1.7):
            landed = int(np.ceil(hit * world.FPS))
            assert (bottom[landed : landed + 2] == world.FLOOR).all() and bottom[landed + 5] < world.FLOOR - 3


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_larger_clip_shows_the_same_and_a_window_is_a_part(kind):
    (scene,) = scenes(1, kind=kind)
    whole, large = world.render_frames(scene, 20), world.render_frames(scene, 20, scale=2)
    assert large.shape == (20, 192, 192, 3)
    halved = large.reshape(20, 96, 2, 96, 2, 3).mean((2, 4))
    assert np.abs(halved - whole).mean() < 0.004 and np.abs(halved - whole)[:, :, :48].max() < 0.5
    np.testing.assert_allclose(world.render_frames(scene, 6, first=9), whole[9:15], atol=1e-6)


def test_mouth_follows_the_sound():
    values = [measure.pearson(seen.mouth, seen.loudness) for seen in map(observe, scenes(8, kind="face"))]
    assert np.mean(values) > 0.8 and min(values) > 0.6


def test_a_silent_or_shifted_soundtrack_is_noticed():
    scene = scenes(1, kind="ball", bounces=2)[0]
    pixels = (world.render_frames(scene, 49) * 255).astype(np.uint8)
    sound = world.render_sound(scene, 49)
    late = np.roll(sound, round(0.2 * world.SAMPLE_RATE))
    for wrong in (np.zeros_like(sound), late):
        seen = measure.observe(pixels, wrong, world.SAMPLE_RATE)
        assert measure.matched(seen.contacts, seen.tones) == 0


def test_an_empty_picture_shows_nothing():
    grey = np.full((10, world.SIZE, world.SIZE, 3), 128, np.uint8)
    seen = measure.observe(grey, np.zeros(10 * world.HOP, np.float32), world.SAMPLE_RATE)
    assert seen.kind is None and seen.colour is None and not len(seen.contacts)


def test_pitches_repeat_in_every_frame():
    assert all(pitch % world.FPS == 0 for pitch in world.PITCHES.values())


def test_what_is_given_is_kept_and_colours_differ():
    for scene in scenes(40, background="red"):
        assert scene.background == "red" and scene.colour != "red"
    face = scenes(1, kind="face", syllables=("ma", "mo"))[0]
    assert face.syllables == ("ma", "mo") and face.bounces is None


def test_the_voice_is_the_one_that_nano_was_trained_on():
    """Samples of its first version; another voice would need another training."""
    sound = world.render_sound(world.draw_scene(np.random.default_rng(1), kind="face"), 51)
    expected = [0.01301, -0.31791, -0.1771, 0.0546, -0.18514, 0.04754, 0.09453, -0.08892]
    np.testing.assert_allclose(sound[12000:52000:5000], expected, atol=1e-5)
