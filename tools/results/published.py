"""Figures that others have published and that nobody measured here, but for Table 1 and Tables A3
and A4, which python_examples/table1_robustness.py has."""

from __future__ import annotations

# Table 2, FAUST, Chamfer x 1e3: L1, L2, each with its deviation over the scans.
TABLE_2 = {
    "AtlasNet, 1 sphere": ((23.56, 2.91), (17.69, 2.45)),
    "AtlasNet, 1 patch": ((18.67, 3.45), (13.38, 2.66)),
    "AtlasNet, 25 patches": ((11.54, 0.53), (7.89, 0.42)),
    "the paper's method": ((10.71, 0.63), (7.32, 0.46)),
}

# The authors' response, MNIST, PGD on the margin (ddb) / cross entropy, worst case over the
# networks that make the attack. Of the paper's own row the text is not certain.
RESPONSE_WORST = {
    "Madry": (96.1, 96.3),
    "TRADES": (96.9, 96.7),
    "the paper's method": (96.7, 97.7),
}
# Training with the sampling phase over training without.
RESPONSE_RATIOS = {"surfaces": 2, "robust training": 8}
# Share of the rows that ten Newton steps bring to the level set.
RESPONSE_CONVERGED = "80 to 90 % early, 20 to 30 % at the end of robust training"

# AutoAttack's public tables, MNIST, L_inf, eps 0.3, percent; all 10 000 images.
AUTOATTACK_MNIST = {
    "Gowal et al.": 96.34,
    "TRADES": 92.81,
    "MMA": 91.40,
    "the paper's network": 90.85,
    "Madry": 88.50,
}
# CIFAR10, L_inf, eps 0.031, ResNet-18.
AUTOATTACK_CIFAR = {"the paper's network": "40.22", "others, no further data": "43.2 to 52.5"}

# Surfaces from points without normals on other scans (Berger et al.), Chamfer / Hausdorff in their
# units: good for the order of the methods alone.
ELSEWHERE = {
    "IGR": (1.38, 16.3),
    "SIREN": (0.42, 7.7),
    "SAL": (0.36, 7.5),
    "DiGS": (0.19, 3.5),
}
