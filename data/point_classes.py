"""The class lists of the indoor benchmarks, in the order of their label files: facts of ScanNet, ScanNet200 and S3DIS.

Note that ScanNet20 and ScanNet200 differ in order (class 1 is floor in one, chair in the other).
"""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """names in the order of the labels 0, 1, ...; ids of the same classes in ScanNet's label table and submissions
    (none for S3DIS); field: the name of the label files."""

    names: tuple[str, ...]
    ids: tuple[int, ...]
    field: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    """"1-3 7" -> 1, 2, 3, 7."""
    ends = [[int(end) for end in part.split("-")] for part in text.split()]
    return tuple(number for first, *last in ends for number in range(first, (last or [first])[0] + 1))


BENCHMARKS = {
    "scannet20": Benchmark(_words("""
        wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, desk, curtain,
        refrigerator, shower curtain, toilet, sink, bathtub, otherfurniture"""),
        _numbers("1-12 14 16 24 28 33 34 36 39"), "segment20"),
    "scannet200": Benchmark(_words("""
        wall, chair, floor, table, door, couch, cabinet, shelf, desk, office chair, bed, pillow, sink, picture, window,
        toilet, bookshelf, monitor, curtain, book, armchair, coffee table, box, refrigerator, lamp, kitchen cabinet,
        towel, clothes, tv, nightstand, counter, dresser, stool, cushion, plant, ceiling, bathtub, end table,
        dining table, keyboard, bag, backpack, toilet paper, printer, tv stand, whiteboard, blanket, shower curtain,
        trash can, closet, stairs, microwave, stove, shoe, computer tower, bottle, bin, ottoman, bench, board,
        washing machine, mirror, copier, basket, sofa chair, file cabinet, fan, laptop, shower, paper, person,
        paper towel dispenser, oven, blinds, rack, plate, blackboard, piano, suitcase, rail, radiator, recycling bin,
        container, wardrobe, soap dispenser, telephone, bucket, clock, stand, light, laundry basket, pipe,
        clothes dryer, guitar, toilet paper holder, seat, speaker, column, bicycle, ladder, bathroom stall,
        shower wall, cup, jacket, storage bin, coffee maker, dishwasher, paper towel roll, machine, mat, windowsill,
        bar, toaster, bulletin board, ironing board, fireplace, soap dish, kitchen counter, doorframe,
        toilet paper dispenser, mini fridge, fire extinguisher, ball, hat, shower curtain rod, water cooler,
        paper cutter, tray, shower door, pillar, ledge, toaster oven, mouse, toilet seat cover dispenser, furniture,
        cart, storage container, scale, tissue box, light switch, crate, power outlet, decoration, sign, projector,
        closet door, vacuum cleaner, candle, plunger, stuffed animal, headphones, dish rack, broom, guitar case,
        range hood, dustpan, hair dryer, water bottle, handicap bar, purse, vent, shower floor, water pitcher, mailbox,
        bowl, paper bag, alarm clock, music stand, projector screen, divider, laundry detergent, bathroom counter,
        object, bathroom vanity, closet wall, laundry hamper, bathroom stall door, ceiling light, trash bin, dumbbell,
        stair rail, tube, bathroom cabinet, cd case, closet rod, coffee kettle, structure, shower head, keyboard piano,
        case of water bottles, coat rack, storage organizer, folded chair, fire alarm, power strip, calendar, poster,
        potted plant, luggage, mattress"""),
        _numbers("""1-11 13-19 21-24 26-29 31-36 38-42 44-52 54-59 62-80 82 84 86-90 93 95-107 110 112 115 116 118
        120-122 125 128 130-132 134 136 138-141 145 148 154-157 159 161 163 165 166 168-170 177 180 185 188 191 193 195
        202 208 213 214 221 229 230 232 233 242 250 261 264 276 283 286 300 304 312 323 325 331 342 356 370 392 395 399
        408 417 488 540 562 570 572 581 609 748 776 1156 1163-1176 1178-1191"""), "segment200"),
    "s3dis": Benchmark(_words("""
        ceiling, floor, wall, beam, column, window, door, table, chair, sofa, bookcase, board, clutter"""),
        (), "segment"),
}
