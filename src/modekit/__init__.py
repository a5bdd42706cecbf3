"""modekit"""
