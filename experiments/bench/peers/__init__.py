"""Side-by-side timings against other libraries; they live in an environment of their own
(`make bench-peers`).
"""
