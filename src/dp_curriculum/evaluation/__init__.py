"""How good the images are: metrics, classifiers, leakage, and the report. It is not covered by the guarantee."""
