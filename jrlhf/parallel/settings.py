"""Every setting of JAX that jrlhf changes for the whole process, each before JAX uses a device."""

import jax


def agree_in_our_own_way() -> None:
    """Set what a run over several processes needs: collectives of the CPU, and SIGTERM left to the run's loop."""
    # Of a CPU; other devices have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM for itself, which must end a run that is not in its loop; and the loop has its own way to agree.
    jax.config.update("jax_enable_preemption_service", False)


def simulate_cpus(count: int) -> None:
    """Let JAX see ``count`` devices of the CPU and no others; where it has started already, it keeps what it has."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass
