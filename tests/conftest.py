"""What all tests share: hypothesis without deadlines, because a busy machine is no defect of the code under test."""

from hypothesis import settings

settings.register_profile("gptdist", deadline=None)
settings.load_profile("gptdist")
