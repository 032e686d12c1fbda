"""The papers' claims in miniature: PLAN.md says what is compared, this package runs and reports it.

    plan.py      PLAN.md as data: what a claim is, the one recipe, commands, costs
    rows.py      the claims themselves: their rows, and what is compared
    sitting.py   runs rows that are not done yet, one JSON line a row and seed in NAME.jsonl
    measure.py   a trained row's scores: ridge probe of frozen features, the judge, curves
    verdict.py   differences, their intervals, the verdict
    show.py      tables for the screen and for README
    canonpose.py, lt_algebraic.py  baselines of HaMuCo's: 2D labels lifted to 3D, or triangulated by learnt confidences
    papers.py    every table and figure of the four papers, with its command at full scale
"""
