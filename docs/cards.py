"""The small pictures of cards.json, cut out of published figures: python docs/cards.py"""

from pathlib import Path

from PIL import Image, ImageOps

DOCS = Path(__file__).parent
FOLDER = DOCS / "_static" / "cards"
SIDE = 240
# {experiment: (figure, left, upper, right, lower)}, in pixels.
CUTS = {
    "xp_transfer_learning": ("adaptation_fashion_mnist-mnist_basis_samples", 6, 57, 398, 449),
    "xp_drmmd": ("rings_paper_ends", 500, 50, 960, 510),
    "xp_data_mixing": ("downstream_paper", 0, 0, 560, 480),
    "xp_gmm_source": ("fashion_mnist_paper_samples", 1382, 1347, 1674, 1662),
    "xp_dataset_distillation": ("fashion_mnist_paper_ECHO", 107, 636, 507, 1036),
}


def make() -> None:
    for name, (figure, *box) in CUTS.items():
        with Image.open(DOCS.parent / name / "published" / f"{figure}.png") as image:
            cut = image.convert("RGB").crop((box[0], box[1], box[2], box[3]))
        picture = ImageOps.pad(cut, (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")
        picture.quantize(128).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    make()
