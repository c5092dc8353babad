"""fst_fast: remove backdoors from image classifiers with Feature Shift Tuning."""
