"""Models to test and measure on: trained digits models, weightless architectures, a catalogue.

This package belongs to the repository, not to the installed wheel: import it from the repository
root. `README.md` says what each model is, where it comes from and under which licence.
"""
