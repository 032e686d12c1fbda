"""The papers' claims in miniature: PLAN.md says what is compared, this package runs and reports it.

    plan.py      the rows, their commands and what is compared: PLAN.md as data
    sitting.py   runs rows that are not done yet, one JSON line a row and seed in NAME.jsonl
    measure.py   a trained row's scores: ridge probe of frozen features, the judge, curves
    verdict.py   differences, their intervals, the verdict
    show.py      tables for the screen and for README
    canonpose.py a baseline of HaMuCo's: 2D labels lifted to 3D
    papers.py    every table and figure of the four papers, with its command at full scale
"""
