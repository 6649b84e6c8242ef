"""Makes our npz of a published .pkl, for those who trust its author.

    python xp_gmm_source/convert.py data/cifar10_gmm2_pca3072_full.pkl --trust_pickle

A pickle runs whatever its author put into it; the npz holds only numbers.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from lib.runs import console
from lib.runs.files import check_writable
from xp_gmm_source import gmm_files


@dataclass(frozen=True)
class Arguments:
    path: tyro.conf.Positional[Path]
    """The .pkl: a dict {'gmm': GaussianMixture, 'pca': PCA or None}."""
    trust_pickle: bool = False
    """You know who made the file, and trust them with your machine."""
    image_shape: tuple[int, int, int] | None = None
    """Height, width and channels. None: square, and color where that fits."""
    output: Path | None = None
    """None: beside the .pkl, with the ending .npz."""


def main(arguments: Arguments) -> Path:
    output = arguments.output or arguments.path.with_suffix(".npz")
    check_writable(output)
    stored = gmm_files.load_published(
        arguments.path, image_shape=arguments.image_shape, trust_pickle=arguments.trust_pickle
    )
    gmm_files.save(output, stored)
    print(f"{gmm_files.kind_of(stored.mixture)}, K = {len(stored.mixture.weights)}: {output}")
    return output


if __name__ == "__main__":
    with console.one_line_errors():
        main(tyro.cli(Arguments))
