"""``g4seg prepare scenes``: the embedded world on disk, as a VOCdevkit tree."""

from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

from g4seg_pl.types import ConfigurationError
from g4seg_pl.world.scenes import CLASS_NAMES, FIRST_SEED, IMAGE_SIZE, Scene, Split, draw_scene


def scenes(
    out: Path = Path("outputs/VOCdevkit/VOC2012"),
    split: Split = "test",
    count: int = 100,
    first: int = 0,
) -> int:
    """Write scenes with exact masks in VOC's layout.

    Writes JPEGImages, SegmentationClass (palette PNG), Annotations (the classes of each image)
    and ImageSets/Segmentation/<split>.txt. Existing files of other splits are kept.

    Args:
        out: the VOC2012 folder to write.
        split: which range of scene seeds to draw from.
        count: how many scenes.
        first: index of the first scene within the split.

    Returns:
        0, the exit status.
    """
    if count < 1 or first < 0:
        message = f"count is {count} and first is {first}: give count >= 1 and first >= 0"
        raise ConfigurationError(message)
    for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (out / name).mkdir(parents=True, exist_ok=True)
    ids = []
    for seed in range(FIRST_SEED[split] + first, FIRST_SEED[split] + first + count):
        image_id = f"scene_{seed:08d}"
        _write(out, image_id, draw_scene(seed))
        ids.append(image_id)
    listing = out / "ImageSets" / "Segmentation" / f"{split}.txt"
    listing.write_text("\n".join(ids) + "\n", encoding="utf-8")
    print(f"{len(ids)} scenes in {out}; refine them with --data.class_names scenes")
    return 0


def _write(out: Path, image_id: str, scene: Scene) -> None:
    from datamodules.seed_files import label_png

    # Full quality and full chroma: seeds and truth were made for the pixels as drawn.
    picture = Image.fromarray(scene.image)
    picture.save(out / "JPEGImages" / f"{image_id}.jpg", quality=100, subsampling=0)
    with (out / "SegmentationClass" / f"{image_id}.png").open("wb") as stream:
        label_png.write(stream, scene.mask)
    annotation = ElementTree.Element("annotation")
    ElementTree.SubElement(annotation, "filename").text = f"{image_id}.jpg"
    size = ElementTree.SubElement(annotation, "size")
    for name, value in (("width", IMAGE_SIZE), ("height", IMAGE_SIZE), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for label in scene.labels:
        thing = ElementTree.SubElement(annotation, "object")
        ElementTree.SubElement(thing, "name").text = CLASS_NAMES[label - 1]
    tree = ElementTree.ElementTree(annotation)
    tree.write(out / "Annotations" / f"{image_id}.xml", encoding="unicode")
