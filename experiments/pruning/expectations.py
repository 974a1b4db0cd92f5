"""What the literature leads one to expect of each way to prune, beside which the tables stand."""

from __future__ import annotations

EXPECTED = {
    "random": "the floor for masks chosen after training",
    "magnitude, uniform": "near dense to 90%, behind global at high sparsity (Han et al. 2015; Blalock et al. 2020)",
    "magnitude, ERK": "above uniform at equal size (Evci et al. 2020)",
    "magnitude, LAMP": "at or above global (Lee et al. 2021)",
    "magnitude, global": "above uniform, the more so the sparser (Blalock et al. 2020)",
    "magnitude, gradual": "the strongest simple baseline (Zhu & Gupta 2017; Gale et al. 2019)",
    "Wanda": "made for no training; fine-tuned it is near magnitude (Sun et al. 2023)",
    "SparseGPT": "made for no training; fine-tuned it is near magnitude (Frantar & Alistarh 2023)",
    "movement": "above magnitude only in transfer and at high sparsity (Sanh et al. 2020)",
    "l0 (hard concrete)": "no better than gradual magnitude, and it varies more (Gale et al. 2019)",
    "variational dropout": "at or above gradual magnitude at high sparsity (Gale et al. 2019)",
    "lottery ticket": "near dense to 90-95%, above its redrawn control (Frankle & Carbin 2019; Frankle et al. 2020)",
    "lottery ticket, redrawn": "below the ticket (Frankle & Carbin 2019)",
    "random at the start": "behind moving masks; a strong baseline with ERK (Liu et al. 2022)",
    "SNIP": "above random, behind what is pruned after training (Frankle et al. 2021)",
    "GraSP": "about SNIP, ahead of it only at extreme sparsity (Wang et al. 2020; Frankle et al. 2021)",
    "SynFlow": "holds on longest at extreme sparsity (Tanaka et al. 2020)",
    "SET": "above static random masks (Mocanu et al. 2018)",
    "RigL": "at or above SET (Evci et al. 2020)",
    "sparse momentum": "at or above SET (Dettmers & Zettlemoyer 2019)",
    "magnitude, not fine-tuned": "collapses beyond 80-90%",
    "Wanda, not fine-tuned": "above magnitude on large language models (Sun et al. 2023)",
    "SparseGPT, not fine-tuned": "far above magnitude (Frantar & Alistarh 2023)",
}
