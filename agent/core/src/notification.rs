//! What ebb tells a pod's application during a drain, if the pod's annotations ask for it: a signal to the processes of
//! its containers, and an HTTP request.
//!
//! Each is sent once per drain, and its outcome is in the report.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::setting::setting_names;

/// A signal that a pod may ask for. Servers use these to begin a graceful shutdown. SIGKILL and SIGSTOP are not among
/// them: no application can act on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum StopSignal {
    /// Signal 1.
    #[serde(rename = "SIGHUP")]
    Hup,
    /// Signal 2.
    #[serde(rename = "SIGINT")]
    Int,
    /// Signal 3: nginx, PHP-FPM, uWSGI.
    #[serde(rename = "SIGQUIT")]
    Quit,
    /// Signal 10: HAProxy.
    #[serde(rename = "SIGUSR1")]
    Usr1,
    /// Signal 12.
    #[serde(rename = "SIGUSR2")]
    Usr2,
    /// Signal 15.
    #[serde(rename = "SIGTERM")]
    Term,
    /// Signal 28: Apache.
    #[serde(rename = "SIGWINCH")]
    Winch,
}

impl StopSignal {
    /// All of them, by number.
    pub const ALL: [Self; 7] = [
        Self::Hup,
        Self::Int,
        Self::Quit,
        Self::Usr1,
        Self::Usr2,
        Self::Term,
        Self::Winch,
    ];

    /// The name, such as `SIGQUIT`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hup => "SIGHUP",
            Self::Int => "SIGINT",
            Self::Quit => "SIGQUIT",
            Self::Usr1 => "SIGUSR1",
            Self::Usr2 => "SIGUSR2",
            Self::Term => "SIGTERM",
            Self::Winch => "SIGWINCH",
        }
    }

    /// The number on x86-64 and arm64 (signal(7)).
    pub const fn number(self) -> u32 {
        match self {
            Self::Hup => 1,
            Self::Int => 2,
            Self::Quit => 3,
            Self::Usr1 => 10,
            Self::Usr2 => 12,
            Self::Term => 15,
            Self::Winch => 28,
        }
    }
}

impl fmt::Display for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for StopSignal {
    type Err = String;

    /// Accepts `SIGQUIT`, `QUIT`, and lower case.
    fn from_str(s: &str) -> Result<Self, String> {
        let upper = s.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let known = |signal: &&Self| signal.name().strip_prefix("SIG") == Some(name);
        Self::ALL.iter().find(known).copied().ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|signal| signal.name()).collect();
            format!("{s:?} is not one of {}", all.join(", "))
        })
    }
}

/// Which containers of a pod get which signal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopSignals {
    /// The signal of all containers that are not named.
    others: Option<StopSignal>,
    /// The signals of named containers.
    named: BTreeMap<String, StopSignal>,
}

impl StopSignals {
    /// Whether no container gets a signal.
    pub fn is_empty(&self) -> bool {
        self.others.is_none() && self.named.is_empty()
    }

    /// The signal of the container with this name.
    pub fn of(&self, container: &str) -> Option<StopSignal> {
        self.named.get(container).copied().or(self.others)
    }
}

impl fmt::Display for StopSignals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = self.named.iter().map(|(name, s)| format!("{name}={s}"));
        let all: Vec<_> = self
            .others
            .iter()
            .map(ToString::to_string)
            .chain(named)
            .collect();
        f.write_str(&if all.is_empty() {
            "none".to_owned()
        } else {
            all.join(",")
        })
    }
}

impl FromStr for StopSignals {
    type Err = String;

    /// Accepts `SIGQUIT` for all containers, or `nginx=SIGQUIT,proxy=SIGUSR1`.
    fn from_str(s: &str) -> Result<Self, String> {
        let mut signals = Self::default();
        for part in s.split(',').map(str::trim) {
            let twice = match part.split_once('=') {
                Some((name, signal)) => {
                    let name = name.trim();
                    if name.is_empty() {
                        return Err(format!("{part:?} names no container"));
                    }
                    let signal = signal.trim().parse()?;
                    signals.named.insert(name.to_owned(), signal).is_some()
                }
                None => signals.others.replace(part.parse()?).is_some(),
            };
            if twice {
                return Err(format!("{s:?} gives a container two signals"));
            }
        }
        Ok(signals)
    }
}

/// The processes of a container that get the signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SignalTarget {
    /// The container's main process.
    #[default]
    Main,
    /// The children of the main process: for a shell that passes no signal on.
    Children,
}

setting_names!(SignalTarget { Main = "main", Children = "children" });

/// The method of a [`DrainRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestMethod {
    /// `GET`
    Get,
    /// `POST`, without a body.
    Post,
}

impl RequestMethod {
    /// The method as in HTTP.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
        }
    }
}

/// An HTTP request to the pod's application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainRequest {
    /// It is made when the settle phase is over; otherwise at the drain's start.
    pub after_settle: bool,
    /// Its method.
    pub method: RequestMethod,
    /// The port in the pod.
    pub port: u16,
    /// Path and query, beginning with `/`. Visible ASCII only, so it is one word of the request line.
    pub path: String,
}

/// The longest path that an annotation may give.
const LONGEST_PATH: usize = 1024;

impl fmt::Display for DrainRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (method, port, path) = (self.method.name(), self.port, &self.path);
        write!(f, "{method} :{port}{path}")
    }
}

impl FromStr for DrainRequest {
    type Err = String;

    /// Accepts `GET :8080/drain`, `POST :8080/drain`, and either after `after-settle `.
    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{s:?} is not a request such as \"GET :8080/drain\" or \"after-settle POST :8080/drain\""
            )
        };
        let mut words: Vec<_> = s.split_ascii_whitespace().collect();
        let after_settle = words.first() == Some(&"after-settle");
        if after_settle {
            words.remove(0);
        }
        let [method, target] = words[..] else {
            return Err(wrong());
        };
        let method = match method {
            "GET" => RequestMethod::Get,
            "POST" => RequestMethod::Post,
            _ => return Err(wrong()),
        };
        let target = target.strip_prefix(':').ok_or_else(wrong)?;
        let (port, path) = target.split_at(target.find('/').ok_or_else(wrong)?);
        let port = port.parse().ok().filter(|port| *port != 0);
        if path.len() > LONGEST_PATH || !path.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(wrong());
        }
        Ok(Self {
            after_settle,
            method,
            port: port.ok_or_else(wrong)?,
            path: path.to_owned(),
        })
    }
}

/// Something to tell the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// Send signals to the processes of the pod's running containers.
    Signal(StopSignals, SignalTarget),
    /// Make this request to the pod.
    Request(DrainRequest),
}

/// What became of a [`Notification`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotificationOutcome {
    /// Of the signals: one entry per process, and one per container without such a process.
    Signaled(Vec<SignalReport>),
    /// Of the request: the status of the answer, or why there is none.
    Requested(Result<u16, String>),
}

/// What became of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum SignalOutcome {
    /// It was sent.
    Sent,
    /// It was sent, and the process ignores it: it does not handle it, and the kernel drops unhandled signals to the
    /// first process of a PID namespace.
    Ignored,
    /// The process had exited.
    Exited,
    /// It was not sent.
    Failed,
}

/// A signal to a process of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SignalReport {
    /// The container's name.
    pub container: String,
    /// The signal.
    pub signal: StopSignal,
    /// The process, in the node's PID namespace. Absent if ebb found none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// What became of it.
    pub outcome: SignalOutcome,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

impl fmt::Display for SignalReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.signal, self.container)?;
        if let Some(pid) = self.pid {
            write!(f, " (process {pid})")?;
        }
        match (self.outcome, &self.detail) {
            (SignalOutcome::Sent, _) => Ok(()),
            (SignalOutcome::Ignored, _) => f.write_str(" ignored: the process does not handle it"),
            (SignalOutcome::Exited, _) => f.write_str(" not sent: the process had exited"),
            (SignalOutcome::Failed, Some(why)) => write!(f, " not sent: {why}"),
            (SignalOutcome::Failed, None) => f.write_str(" not sent"),
        }
    }
}

/// The request to the application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct RequestReport {
    /// The request, such as `GET :8080/drain`.
    pub request: String,
    /// The status of its answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why there was no answer. Absent together with `status`: it is not known yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl fmt::Display for RequestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.request)?;
        match (self.status, &self.error) {
            (Some(status), _) => write!(f, " answered {status}"),
            (None, Some(why)) => write!(f, " failed: {why}"),
            (None, None) => f.write_str(" sent"),
        }
    }
}

/// What a drain has told the application so far. Each is present once it was sent, even if its outcome is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Notified {
    /// The signals. Empty until their outcome is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signals: Option<Vec<SignalReport>>,
    /// The request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<RequestReport>,
}

impl Notified {
    /// Nothing was sent.
    pub const NOTHING: Self = Self {
        signals: None,
        request: None,
    };

    /// Whether nothing was sent.
    pub fn is_nothing(&self) -> bool {
        *self == Self::NOTHING
    }

    /// One phrase per signal and request, in the order of their sending.
    pub fn phrases(&self) -> Vec<String> {
        let request = self.request.iter().map(ToString::to_string);
        let signals = self.signals.iter().flatten().map(ToString::to_string);
        request.chain(signals).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_parse_with_and_without_their_prefix_and_others_are_refused() {
        for signal in StopSignal::ALL {
            assert_eq!(signal.name().parse(), Ok(signal));
            assert_eq!(signal.name()[3..].to_lowercase().parse(), Ok(signal));
        }
        for bad in ["SIGKILL", "KILL", "STOP", "9", "15", "", "SIGSIGTERM"] {
            let error = bad.parse::<StopSignal>().unwrap_err();
            assert!(error.contains("SIGHUP, SIGINT"), "{error}");
        }
    }

    #[test]
    fn signals_are_for_all_containers_or_for_those_that_are_named() {
        let all: StopSignals = "SIGQUIT".parse().unwrap();
        assert_eq!(all.of("any"), Some(StopSignal::Quit));
        let named: StopSignals = "web=QUIT, proxy = USR1".parse().unwrap();
        assert_eq!(named.of("web"), Some(StopSignal::Quit));
        assert_eq!(named.of("proxy"), Some(StopSignal::Usr1));
        assert_eq!(named.of("other"), None);
        assert_eq!(named.to_string(), "proxy=SIGUSR1,web=SIGQUIT");
        assert_eq!(named.to_string().parse(), Ok(named));
        for bad in ["", "web=", "=QUIT", "QUIT,TERM", "web=QUIT,web=TERM", "web"] {
            assert!(bad.parse::<StopSignals>().is_err(), "{bad}");
        }
    }

    #[test]
    fn requests_parse_as_they_print_and_can_not_smuggle_a_second_line() {
        let request: DrainRequest = "after-settle POST :8080/drain?now=1".parse().unwrap();
        assert!(request.after_settle);
        assert_eq!(request.to_string(), "POST :8080/drain?now=1");
        let request: DrainRequest = "GET :1/".parse().unwrap();
        assert!(!request.after_settle);
        assert_eq!((request.port, request.path.as_str()), (1, "/"));
        for bad in [
            "",
            "GET",
            "GET /drain",
            "GET :8080",
            "GET :0/x",
            "GET :65536/x",
            "PUT :80/x",
            "get :80/x",
            "GET :80/a b",
            "GET :80/a\r\nHost: x",
            "GET :80/a\u{1}",
            "GET :80/ä",
            "GET 10.0.0.1:80/x",
            "before-settle GET :80/x",
            &format!("GET :80/{}", "a".repeat(LONGEST_PATH)),
        ] {
            assert!(bad.parse::<DrainRequest>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_report_says_what_was_sent_and_why_not() {
        let mut signal = SignalReport {
            container: "web".into(),
            signal: StopSignal::Quit,
            pid: Some(4242),
            outcome: SignalOutcome::Sent,
            detail: None,
        };
        assert_eq!(signal.to_string(), "SIGQUIT to web (process 4242)");
        signal.outcome = SignalOutcome::Ignored;
        assert!(signal.to_string().contains("does not handle it"));
        signal.outcome = SignalOutcome::Failed;
        signal.detail = Some("not permitted".into());
        let request = RequestReport {
            request: "GET :1/".into(),
            status: Some(204),
            error: None,
        };
        let notified = Notified {
            signals: Some(vec![signal]),
            request: Some(request),
        };
        assert_eq!(
            notified.phrases(),
            [
                "GET :1/ answered 204",
                "SIGQUIT to web (process 4242) not sent: not permitted"
            ]
        );
    }
}
