"""Quality of generated images: metrics, classifiers, leakage, and the report. It is not covered by the guarantee."""
