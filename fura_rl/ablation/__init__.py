"""Sweeps over adapters, learning rates and seeds at equal budgets: spec -> cells -> results -> report."""
