//! How a stop of a container ends, by the program behind its main process. Pure, except for [`process`].
//!
//! "Catches the signal" is not "stops well". What decides:
//!
//! 1. [`process`] reads the main process and, below inits and shells, its children.
//! 2. [`kind`] tells what program it is, [`servers`] what known servers do on each signal.
//! 3. [`ending`] follows the stop signal to the process that acts on it.
//! 4. [`advice`] writes the finding: what happens, which requests that costs, and the change to make.
//!
//! # What the masks of a runtime show
//!
//! Measured with each program as the first process of a PID namespace, with `SigCgt` of `/proc/PID/status` before
//! SIGTERM, once without and once with a handler of the application's own (Debian 12; Node 18 and 20, OpenJDK 17,
//! Python 3.11, Ruby 3.1, Go 1.19):
//!
//! | runtime | SIGTERM in `SigCgt` without a handler | with one | SIGTERM without a handler |
//! | --- | --- | --- | --- |
//! | Python | no | yes | dropped by the kernel; it runs on until SIGKILL |
//! | Node | yes | yes, the same mask | Node resets the terminal, sets the default action and raises it again, which the kernel drops; it runs on until SIGKILL |
//! | Java | yes | yes, the same mask (a shutdown hook) | it runs its shutdown hooks and exits, at once if there are none |
//! | Java with `-Xrs` | no | no | dropped by the kernel; it runs on until SIGKILL |
//! | Ruby | yes | yes, the same mask | a SignalException ends it at once |
//! | Go | yes | yes, the same mask | the runtime exits at once; on SIGQUIT it dumps its goroutines and exits |
//! | a shell | no | yes (`trap`) | dropped by the kernel; its child gets nothing |
//!
//! So a handler can be seen in Python programs and shells only. For Node, Java, Ruby and Go the doctor says that it
//! can't tell, and what happens without one. As any other process than the first one, all of them end at once.
//!
//! Inits have no handler either: tini waits for all signals in sigtimedwait, catatonit and s6 by a signalfd
//! (`linux/signal_handling/waiting.rs`), dumb-init catches.

pub(super) mod advice;
mod ending;
mod kind;
pub(super) mod process;
mod servers;

#[cfg(test)]
mod testing;
