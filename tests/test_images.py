"""Pictures of every kind that Pillow makes: read as they look, or refused with the reason."""

from io import BytesIO
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

from crosslayer import Example, UserError
from crosslayer.data.images import open_image
from crosslayer.models.prompts import prepare

RED, WHITE, HALF = (255, 0, 0), (255, 255, 255), (255, 127, 127)


def saved(path, image: Image.Image, **settings):
    image.save(path, **settings)
    return path


def half_red(mode: str) -> Image.Image:
    """Red on the left, transparent on the right."""
    image = Image.new("RGBA", (8, 4), (*RED, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 4))
    return image if mode == "RGBA" else image.convert(mode)


def test_alpha_is_laid_on_white(tmp_path):
    image = open_image(saved(tmp_path / "a.png", half_red("RGBA")))
    assert (image.mode, image.getpixel((1, 1)), image.getpixel((6, 1))) == ("RGB", RED, WHITE)
    faint = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert open_image(saved(tmp_path / "f.png", faint)).getpixel((1, 1)) == pytest.approx(HALF, abs=1)
    grey = Image.merge("LA", (Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 0)))
    assert open_image(saved(tmp_path / "la.png", grey)).getpixel((1, 1)) == WHITE


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((0, 0), 0)
    image = open_image(saved(tmp_path / "p.png", image, transparency=1))
    assert (image.getpixel((0, 0)), image.getpixel((2, 2))) == (RED, WHITE)


def test_cmyk_is_converted(tmp_path):
    image = open_image(saved(tmp_path / "c.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=95))
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == pytest.approx(RED, abs=8)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_16_bits_keep_their_shades(tmp_path, name):
    shades = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    image = open_image(saved(tmp_path / name, Image.fromarray(shades)))
    assert [image.getpixel((i, 0)) for i in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_floating_point_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "f.tif", Image.fromarray(np.array([[0.5, 2.0]], np.float32)))
    with pytest.raises(UserError, match=rf"^{path}: holds floating-point numbers, whose white is unknown"):
        open_image(path)


def test_exif_turns_the_picture(tmp_path):
    image = Image.new("RGB", (30, 10), "blue")
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    turned = open_image(saved(tmp_path / "e.png", image, exif=exif))
    assert turned.size == (10, 30)
    assert (turned.getpixel((5, 3)), turned.getpixel((5, 27))) == (RED, (0, 0, 255))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    settings = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **settings)
    assert open_image(tmp_path / name).getpixel((4, 4)) == RED


def test_the_ending_of_a_name_decides_nothing(tmp_path):
    path = saved(tmp_path / "really-a-png.jpg", Image.new("RGB", (4, 4), "red"), format="png")
    assert open_image(path).getpixel((1, 1)) == RED


def test_bytes_are_read_as_a_file_is():
    file = BytesIO()
    Image.new("L", (4, 4), 7).save(file, "png")
    assert Example("a", "x", image=file.getvalue()).picture().getpixel((1, 1)) == (7, 7, 7)
    with pytest.raises(UserError, match="a: is not an image that Pillow can read"):
        Example("a", "x", image=b"no picture").picture()


def test_pictures_in_memory_are_read_as_files_are():
    assert Example("a", "x", image=half_red("RGBA")).picture().getpixel((6, 1)) == WHITE
    assert Example("a", "x", image=Image.new("1", (4, 4), 1)).picture().getpixel((1, 1)) == WHITE


def test_a_pixel_and_a_ribbon_reach_the_model(llava):
    for size in ((1, 1), (1, 3), (4000, 1), (3000, 2000)):
        batch = prepare(llava.model, llava.processor, [Example("a", "no", image=Image.new("RGB", size, "red"))])
        assert batch.image.sum() == 9
        assert batch.inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_damaged_files_are_refused(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name in ("cut.png", "cut.jpg", "cut.gif", "cut.webp"):
        whole = saved(tmp_path / f"whole-{name}", noise).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(UserError, match=rf"{name}: (the image is damaged|is not an image)"):
            open_image(tmp_path / name)
    (tmp_path / "none.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"none.png: is empty \(0 bytes\); give a PNG or JPEG file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(UserError, match=r"text.png: is not an image that Pillow can read; give a PNG or JPEG file"):
        open_image(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"missing.png: no such image"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="is a folder; name one image in it"):
        open_image(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(side))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was unpacked"))
    with pytest.raises(UserError, match=r"bomb.png: has .*more than 89,478,485.*make it smaller"):
        open_image(path)


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_refused_where_warnings_are_errors(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(10_000))
    with pytest.raises(UserError, match=r"bomb.png: has more than 89,478,485 pixels; make it smaller"):
        open_image(tmp_path / "bomb.png")


def bomb(side: int) -> bytes:
    """A PNG that says it has side x side pixels; a few hundred bytes."""
    file = BytesIO()
    Image.new("1", (8, 8)).save(file, "png")
    whole = bytearray(file.getvalue())
    whole[16:24] = side.to_bytes(4) * 2
    whole[29:33] = crc32(bytes(whole[12:29])).to_bytes(4)
    return bytes(whole)
