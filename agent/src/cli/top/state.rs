//! What `ebb top` shows, and how a key changes it. Pure: no I/O and no drawing.

use ebb_core::{drain_report::Report, ids::PodName};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::rows::{FlowId, RowId, Rows, sort_columns};

/// One page of the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum View {
    /// The pods of the node.
    Pods,
    /// All drains that the agent remembers.
    Drains,
    /// The connections of a pod.
    Flows(PodName),
    /// One connection of a pod.
    FlowDetails(PodName, FlowId),
    /// A drain of a pod: the one that began at this time, or else the last one.
    DrainReport(PodName, Option<String>),
}

/// A request to the agent, for the data of a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DataRequest {
    /// The pods, and the drains under way.
    Pods,
    /// The drains.
    Drains,
    /// The connections of a pod; `outbound`: also those that it dialled.
    Flows { pod: PodName, outbound: bool },
}

/// A view, and which part of it is shown.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) view: View,
    /// Words that each row must contain.
    pub(super) filter: String,
    /// The place of the order in [`sort_columns`].
    pub(super) sort: usize,
    pub(super) reversed: bool,
    /// The selected row. It stays selected when others come and go.
    selected: Option<RowId>,
    /// Where that row is, or the first line of a text.
    pub(super) index: usize,
    /// The first row on the screen.
    pub(super) top: usize,
}

impl Page {
    const fn new(view: View) -> Self {
        Self {
            view,
            filter: String::new(),
            sort: 0,
            reversed: false,
            selected: None,
            index: 0,
            top: 0,
        }
    }

    /// Whether the row has all words of the filter. Upper and lower case are the same.
    pub(super) fn accepts(&self, row: impl FnOnce() -> String) -> bool {
        if self.filter.is_empty() {
            return true;
        }
        let row = row().to_lowercase();
        let filter = self.filter.to_lowercase();
        filter.split_whitespace().all(|word| row.contains(word))
    }

    /// Selects the row at `index`, or the nearest one that exists.
    fn select(&mut self, index: usize, rows: &Rows<'_>) {
        self.index = index.min(rows.len().saturating_sub(1));
        self.selected = rows.id(self.index);
    }

    /// Makes the page fit `rows`, of which the screen shows `height`.
    fn settle(&mut self, rows: &Rows<'_>, height: usize) {
        if let Rows::Text(lines) = rows {
            // A text scrolls until its last line is at the bottom.
            self.index = self.index.min(lines.len().saturating_sub(height));
            self.top = self.index;
            return;
        }
        let place = self.selected.as_ref().and_then(|id| rows.position(id));
        self.select(place.unwrap_or(self.index), rows);
        // A screen without a line for rows is treated as if it had one.
        let height = height.max(1);
        let last_top = rows.len().saturating_sub(height);
        let lowest = (self.index + 1).saturating_sub(height);
        self.top = self.top.clamp(lowest, self.index).min(last_top);
    }
}

/// What a key has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyOutcome {
    Continue,
    /// Draw everything again.
    Redraw,
    Quit,
}

/// All that `ebb top` remembers besides the agent's answers.
#[derive(Debug)]
pub(super) struct TopState {
    /// The pages from the node to what is shown. Never empty.
    pages: Vec<Page>,
    /// Whether keys are the text of the filter.
    pub(super) typing: bool,
    /// Whether the help is shown.
    pub(super) help: bool,
    /// Whether pods without connections are shown.
    pub(super) empty_pods: bool,
    /// Whether connections that the pod dialled are shown.
    pub(super) outbound: bool,
}

impl TopState {
    pub(super) fn new() -> Self {
        Self {
            pages: vec![Page::new(View::Pods)],
            typing: false,
            help: false,
            empty_pods: true,
            outbound: false,
        }
    }

    /// The page that is shown.
    pub(super) fn page(&self) -> &Page {
        self.pages.last().expect("a page is never the last to go")
    }

    fn page_mut(&mut self) -> &mut Page {
        let page = self.pages.last_mut();
        page.expect("a page is never the last to go")
    }

    /// The views from the node to the one that is shown.
    pub(super) fn path(&self) -> impl Iterator<Item = &View> {
        self.pages.iter().map(|page| &page.view)
    }

    /// What the agent must be asked for.
    pub(super) fn request(&self) -> DataRequest {
        match &self.page().view {
            View::Pods => DataRequest::Pods,
            View::Drains | View::DrainReport(..) => DataRequest::Drains,
            View::Flows(pod) | View::FlowDetails(pod, _) => DataRequest::Flows {
                pod: pod.clone(),
                outbound: self.outbound,
            },
        }
    }

    /// Makes the page fit new rows or a new size of the screen.
    pub(super) fn settle(&mut self, rows: &Rows<'_>, height: usize) {
        self.page_mut().settle(rows, height);
    }

    /// Acts on a key. `rows` are those of the page, of which the screen shows `height`.
    pub(super) fn press(&mut self, key: KeyEvent, rows: &Rows<'_>, height: usize) -> KeyOutcome {
        if key.kind == KeyEventKind::Release {
            return KeyOutcome::Continue;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return self.press_with_control(key.code, rows, height);
        }
        if self.help {
            self.help = false;
        } else if self.typing {
            self.type_filter(key.code);
        } else {
            return self.command(key.code, rows, height);
        }
        KeyOutcome::Continue
    }

    fn press_with_control(&mut self, key: KeyCode, rows: &Rows<'_>, height: usize) -> KeyOutcome {
        match key {
            KeyCode::Char('c') => return KeyOutcome::Quit,
            KeyCode::Char('l') => return KeyOutcome::Redraw,
            KeyCode::Char('u') if self.typing => self.page_mut().filter.clear(),
            KeyCode::Char('f') => self.go_down(height, rows),
            KeyCode::Char('b') => self.go_up(height, rows),
            _ => {}
        }
        KeyOutcome::Continue
    }

    fn type_filter(&mut self, key: KeyCode) {
        let filter = &mut self.page_mut().filter;
        match key {
            KeyCode::Char(c) => filter.push(c),
            KeyCode::Backspace => {
                filter.pop();
            }
            KeyCode::Esc => {
                filter.clear();
                self.typing = false;
            }
            KeyCode::Enter => self.typing = false,
            _ => {}
        }
    }

    fn command(&mut self, key: KeyCode, rows: &Rows<'_>, height: usize) -> KeyOutcome {
        match key {
            KeyCode::Char('q') => return KeyOutcome::Quit,
            KeyCode::Char('?') | KeyCode::F(1) => self.help = true,
            KeyCode::Down | KeyCode::Char('j') => self.go_down(1, rows),
            KeyCode::Up | KeyCode::Char('k') => self.go_up(1, rows),
            KeyCode::PageDown | KeyCode::Char(' ') => self.go_down(height, rows),
            KeyCode::PageUp => self.go_up(height, rows),
            KeyCode::Home | KeyCode::Char('g') => self.go_up(usize::MAX, rows),
            KeyCode::End | KeyCode::Char('G') => self.go_down(usize::MAX, rows),
            KeyCode::Enter | KeyCode::Right | KeyCode::Char('l') => self.open(rows),
            KeyCode::Esc | KeyCode::Left | KeyCode::Backspace | KeyCode::Char('h') => self.back(),
            KeyCode::Char('d') => self.open_report(rows),
            KeyCode::Char('D') => {
                self.pages.truncate(1);
                self.pages.push(Page::new(View::Drains));
            }
            KeyCode::Char('/') if rows.are_a_list() => self.typing = true,
            KeyCode::Char('s') => self.sort_by_next(),
            KeyCode::Char('r') => {
                let page = self.page_mut();
                page.reversed = !page.reversed;
            }
            KeyCode::Char('e') => self.empty_pods = !self.empty_pods,
            KeyCode::Char('o') => self.outbound = !self.outbound,
            _ => {}
        }
        KeyOutcome::Continue
    }

    fn go_down(&mut self, by: usize, rows: &Rows<'_>) {
        let page = self.page_mut();
        page.select(page.index.saturating_add(by), rows);
    }

    fn go_up(&mut self, by: usize, rows: &Rows<'_>) {
        let page = self.page_mut();
        page.select(page.index.saturating_sub(by), rows);
    }

    fn sort_by_next(&mut self) {
        let page = self.page_mut();
        let orders = sort_columns(&page.view).len();
        page.sort = (page.sort + 1) % orders.max(1);
        page.reversed = false;
    }

    /// Opens what is selected: node → pod → connection → report.
    fn open(&mut self, rows: &Rows<'_>) {
        let index = self.page().index;
        let next = match rows {
            Rows::Pods(pods) => pods.get(index).map(|row| View::Flows(row.pod.pod.clone())),
            Rows::Drains(drains) => drains.get(index).map(|report| report_of(report)),
            Rows::Flows(flows) => flows.get(index).map(|flow| {
                let pod = PodName::clone(&flow.pod);
                View::FlowDetails(pod, FlowId::of(flow))
            }),
            Rows::Text(_) => return self.open_report(rows),
            Rows::Unknown => None,
        };
        self.pages.extend(next.map(Page::new));
    }

    /// Opens the last drain of the pod that is selected or shown.
    fn open_report(&mut self, rows: &Rows<'_>) {
        let page = self.page();
        let next = match (&page.view, rows) {
            (View::Pods, Rows::Pods(pods)) => pods.get(page.index).map(|row| {
                let pod = row.pod.pod.clone();
                View::DrainReport(pod, None)
            }),
            (View::Drains, Rows::Drains(drains)) => drains.get(page.index).map(|r| report_of(r)),
            (View::Flows(pod) | View::FlowDetails(pod, _), _) => {
                Some(View::DrainReport(pod.clone(), None))
            }
            _ => None,
        };
        self.pages.extend(next.map(Page::new));
    }

    /// Clears the filter, or leaves the page.
    fn back(&mut self) {
        let page = self.page_mut();
        if !page.filter.is_empty() {
            page.filter.clear();
        } else if self.pages.len() > 1 {
            self.pages.pop();
        }
    }
}

fn report_of(report: &Report) -> View {
    View::DrainReport(report.pod.clone(), Some(report.started_at.clone()))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{rows::Answers, testing::answers},
        *,
    };

    /// How many rows the screen shows.
    const HEIGHT: usize = 20;

    fn press(state: &mut TopState, answers: &Answers, code: KeyCode) -> KeyOutcome {
        let key = KeyEvent::new(code, KeyModifiers::NONE);
        let outcome = state.press(key, &answers.rows(state, 80), HEIGHT);
        state.settle(&answers.rows(state, 80), HEIGHT);
        outcome
    }

    fn type_text(state: &mut TopState, answers: &Answers, text: &str) {
        for c in text.chars() {
            press(state, answers, KeyCode::Char(c));
        }
    }

    #[test]
    fn enter_goes_from_the_node_to_a_report_and_escape_back() {
        let answers = answers(3);
        let mut state = TopState::new();
        state.settle(&answers.rows(&state, 80), HEIGHT);
        assert_eq!(state.request(), DataRequest::Pods);
        press(&mut state, &answers, KeyCode::Down);
        press(&mut state, &answers, KeyCode::Enter);
        let View::Flows(pod) = state.page().view.clone() else {
            panic!("{:?}", state.page());
        };
        assert_eq!(pod.name, "web");
        let flows = |outbound| DataRequest::Flows {
            pod: pod.clone(),
            outbound,
        };
        assert_eq!(state.request(), flows(false));
        press(&mut state, &answers, KeyCode::Char('o'));
        assert_eq!(state.request(), flows(true));
        press(&mut state, &answers, KeyCode::End);
        press(&mut state, &answers, KeyCode::Enter);
        let View::FlowDetails(_, flow) = &state.page().view else {
            panic!("{:?}", state.page());
        };
        assert_eq!(flow.remote().to_string(), "10.1.0.2:1026");
        press(&mut state, &answers, KeyCode::Enter);
        assert_eq!(state.page().view, View::DrainReport(pod.clone(), None));
        assert_eq!(state.request(), DataRequest::Drains);
        for depth in [3, 2, 1, 1] {
            press(&mut state, &answers, KeyCode::Esc);
            assert_eq!(state.path().count(), depth);
        }
        assert_eq!(state.page().index, 1, "the pod is still selected");
    }

    #[test]
    fn the_selected_row_stays_selected_when_rows_come_and_go() {
        let mut answers = answers(100);
        let mut state = TopState::new();
        state.settle(&answers.rows(&state, 80), HEIGHT);
        press(&mut state, &answers, KeyCode::Down);
        press(&mut state, &answers, KeyCode::Enter);
        for _ in 0..3 {
            press(&mut state, &answers, KeyCode::PageDown);
        }
        assert_eq!((state.page().index, state.page().top), (60, 41));
        let flows = &mut answers.flows.as_mut().unwrap().1.flows;
        flows.drain(..50);
        state.settle(&answers.rows(&state, 80), HEIGHT);
        assert_eq!((state.page().index, state.page().top), (10, 10));
        // It ends: the row in its place is selected.
        answers.flows.as_mut().unwrap().1.flows.remove(10);
        state.settle(&answers.rows(&state, 80), HEIGHT);
        assert_eq!(state.page().index, 10);
        answers.flows.as_mut().unwrap().1.flows.truncate(4);
        state.settle(&answers.rows(&state, 80), HEIGHT);
        assert_eq!((state.page().index, state.page().top), (3, 0));
        answers.flows.as_mut().unwrap().1.flows.clear();
        state.settle(&answers.rows(&state, 80), HEIGHT);
        assert_eq!((state.page().index, state.page().top), (0, 0));
        press(&mut state, &answers, KeyCode::Enter);
        assert_eq!(state.path().count(), 2, "nothing to open");
    }

    #[test]
    fn q_is_a_letter_of_the_filter_and_closes_the_help() {
        let answers = answers(0);
        let mut state = TopState::new();
        type_text(&mut state, &answers, "/qx");
        press(&mut state, &answers, KeyCode::Backspace);
        assert_eq!((state.page().filter.as_str(), state.typing), ("q", true));
        press(&mut state, &answers, KeyCode::Enter);
        assert!(!state.typing && state.page().filter == "q");
        press(&mut state, &answers, KeyCode::Esc);
        assert_eq!(state.page().filter, "");
        type_text(&mut state, &answers, "?q");
        assert!(!state.help);
        assert_eq!(
            press(&mut state, &answers, KeyCode::Char('q')),
            KeyOutcome::Quit
        );
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        type_text(&mut state, &answers, "/");
        let outcome = state.press(control_c, &answers.rows(&state, 80), HEIGHT);
        assert_eq!(outcome, KeyOutcome::Quit);
    }

    #[test]
    fn the_drains_of_the_node_lead_to_their_reports() {
        let answers = answers(0);
        let mut state = TopState::new();
        type_text(&mut state, &answers, "D");
        assert_eq!(state.request(), DataRequest::Drains);
        type_text(&mut state, &answers, "G");
        press(&mut state, &answers, KeyCode::Enter);
        let View::DrainReport(pod, Some(_)) = &state.page().view else {
            panic!("{:?}", state.page());
        };
        assert_eq!(pod.name, "api");
        // A text scrolls, but not past its end.
        type_text(&mut state, &answers, "G");
        assert_eq!(state.page().top, 0);
        let key = KeyEvent::new(KeyCode::Char('G'), KeyModifiers::NONE);
        state.press(key, &answers.rows(&state, 80), 4);
        state.settle(&answers.rows(&state, 80), 4);
        let lines = answers.rows(&state, 80).len();
        assert_eq!(state.page().top, lines - 4);
    }
}
