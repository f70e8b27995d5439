"""The engine: ΔW in factored form, its spectrum, and truncated factors."""
