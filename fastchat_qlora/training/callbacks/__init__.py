"""A live trainer -> checks, logs and decisions while it trains.

Start with step_monitor.StepMonitor and gradient_guards.GradientGuard.
"""
