//! The metrics that Prometheus clients have for their own process.
//! <https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>
//!
//! kubert-prometheus-process does the same, for an older prometheus-client.

use std::{fmt, fs};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

/// Reads `/proc/self` at each scrape. A value that can't be read is left out.
#[derive(Debug)]
pub(super) struct OwnProcess;

/// Values of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stat {
    /// User and system time, in seconds.
    cpu: f64,
    /// When it started, in seconds since boot.
    started: f64,
    virtual_bytes: u64,
    resident_bytes: u64,
}

impl Stat {
    /// Reads the file's text (`proc_pid_stat(5)`). The program's name, in parentheses, may contain anything.
    fn parse(text: &str, ticks_per_second: u64, page_size: u64) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        // The first one is field 3.
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let seconds = |ticks: u64| ticks as f64 / ticks_per_second as f64;
        Some(Self {
            cpu: seconds(field(14)? + field(15)?),
            started: seconds(field(22)?),
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * page_size,
        })
    }

    fn read() -> Option<Self> {
        let text = fs::read_to_string("/proc/self/stat").ok()?;
        Self::parse(&text, clock_ticks_per_second(), page_size() as u64)
    }
}

/// When the system booted, in seconds since 1970.
fn booted() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.trim().parse().ok()
}

impl Collector for OwnProcess {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name, help, unit: Option<&Unit>, value: f64| {
            let gauge = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
            ConstGauge::new(value).encode(gauge)
        };
        // The directory that is read here is one of them.
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            let open = open.count().saturating_sub(1) as f64;
            gauge("open_fds", "Open file descriptors.", None, open)?;
        }
        let limit = getrlimit(Resource::Nofile).current;
        let limit = limit.map_or(f64::INFINITY, |limit| limit as f64);
        gauge(
            "max_fds",
            "The limit of open file descriptors.",
            None,
            limit,
        )?;
        let Some(stat) = Stat::read() else {
            return Ok(());
        };
        let bytes = Some(&Unit::Bytes);
        let help = "Resident memory.";
        gauge("resident_memory", help, bytes, stat.resident_bytes as f64)?;
        let help = "Virtual memory.";
        gauge("virtual_memory", help, bytes, stat.virtual_bytes as f64)?;
        if let Some(booted) = booted() {
            let help = "When the process started, in seconds since 1970.";
            let started = booted + stat.started;
            gauge("start_time", help, Some(&Unit::Seconds), started)?;
        }
        let help = "User and system CPU time.";
        let cpu =
            encoder.encode_descriptor("cpu", help, Some(&Unit::Seconds), MetricType::Counter)?;
        ConstCounter::new(stat.cpu).encode(cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 4 0 300 4096 3 18446744073709551615 1 1";
        let stat = Stat::parse(text, 100, 4096).unwrap();
        assert_eq!(
            stat,
            Stat {
                cpu: 2.0,
                started: 3.0,
                virtual_bytes: 4096,
                resident_bytes: 3 * 4096,
            }
        );
        assert_eq!(Stat::parse("7 (a) S 1", 100, 4096), None);
    }

    #[test]
    fn this_process_has_used_memory_and_has_started_before_now() {
        let stat = Stat::read().unwrap();
        assert!(
            (1 << 20..1 << 40).contains(&stat.resident_bytes),
            "{stat:?}"
        );
        let now = std::time::SystemTime::now();
        let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - booted().unwrap() - stat.started;
        assert!((-2.0..3600.0).contains(&age), "started {age} s ago");
    }
}
