"""Learned samplers of what a graph of states builds."""
