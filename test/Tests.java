//JAVA 17+
//DEPS org.junit.platform:junit-platform-console-standalone:6.1.3
//DEPS org.assertj:assertj-core:3.27.7
//DEPS com.fasterxml.jackson.core:jackson-databind:2.20.1
//DEPS com.fasterxml.jackson.dataformat:jackson-dataformat-yaml:2.20.1
//DEPS io.fabric8:kubernetes-model-apps:7.4.0
//SOURCES ../buildkit-prestop.java
//SOURCES *Test.java
//SOURCES Dockerd.java
//SOURCES Hook.java
//SOURCES Server.java
//SOURCES Tools.java
//MAIN Tests

import java.io.IOException;
import java.io.PrintWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.logging.Level;
import java.util.logging.Logger;
import java.util.stream.Stream;
import org.junit.platform.engine.TestExecutionResult;
import org.junit.platform.engine.discovery.DiscoverySelectors;
import org.junit.platform.launcher.LauncherDiscoveryRequest;
import org.junit.platform.launcher.TestExecutionListener;
import org.junit.platform.launcher.TestIdentifier;
import org.junit.platform.launcher.TestPlan;
import org.junit.platform.launcher.core.LauncherDiscoveryRequestBuilder;
import org.junit.platform.launcher.core.LauncherFactory;
import org.junit.platform.launcher.listeners.SummaryGeneratingListener;
import org.junit.platform.launcher.listeners.TestExecutionSummary;

/** Runs the test classes and sums up. Start it from the repository's root, as test/run does. */
class Tests {

    /** It warns of every symbolic link that it deletes with a temporary directory. */
    private static final Logger JUNIT_LOG = Logger.getLogger("org.junit");

    /** Takes the names of the classes to run; none: all of them. */
    public static void main(String... names) throws IOException {
        JUNIT_LOG.setLevel(Level.SEVERE);
        Hook.javaCommand(); // JBang compiles the script before the first test waits for a hook
        List<String> chosen = names.length == 0 ? allClasses() : List.of(names);
        LauncherDiscoveryRequest request = LauncherDiscoveryRequestBuilder.request()
                .selectors(chosen.stream().map(DiscoverySelectors::selectClass).toList())
                .configurationParameter("junit.jupiter.execution.parallel.enabled", "true")
                .configurationParameter("junit.jupiter.execution.parallel.mode.default", "concurrent")
                .configurationParameter("junit.jupiter.execution.parallel.config.executor-service",
                        "WORKER_THREAD_POOL")
                .configurationParameter("junit.jupiter.execution.parallel.config.strategy", "fixed")
                .configurationParameter("junit.jupiter.execution.parallel.config.fixed.parallelism", "6")
                // For what hangs, and longer than any patience.
                .configurationParameter("junit.jupiter.execution.timeout.default", "20 m")
                .build();
        SummaryGeneratingListener sum = new SummaryGeneratingListener();
        LauncherFactory.create().execute(request, sum, new Progress());
        TestExecutionSummary summary = sum.getSummary();
        summary.printFailuresTo(new PrintWriter(System.out, true), 5);
        long skipped = summary.getTestsSkippedCount() + summary.getTestsAbortedCount();
        long failed = summary.getTotalFailureCount();
        System.out.println(
                summary.getTestsSucceededCount() + " passed, " + failed + " failed, " + skipped + " skipped");
        boolean skippingIsFailing = "true".equals(System.getenv("CI"));
        System.exit(failed > 0 || skippingIsFailing && skipped > 0 || summary.getTestsSucceededCount() == 0 ? 1 : 0);
    }

    private static List<String> allClasses() throws IOException {
        try (Stream<Path> files = Files.list(Path.of("test"))) {
            return files.map(file -> file.getFileName().toString()).filter(name -> name.endsWith("Test.java"))
                    .map(name -> name.replace(".java", "")).sorted().toList();
        }
    }

    /** One line per test that ended. */
    private static final class Progress implements TestExecutionListener {
        private TestPlan plan;

        @Override
        public void testPlanExecutionStarted(TestPlan plan) {
            this.plan = plan;
        }

        @Override
        public void executionSkipped(TestIdentifier test, String reason) {
            System.out.println("skipped  " + name(test) + ": " + reason);
        }

        @Override
        public void executionFinished(TestIdentifier test, TestExecutionResult result) {
            String outcome = switch (result.getStatus()) {
                case SUCCESSFUL -> "passed   ";
                case ABORTED -> "skipped  ";
                case FAILED -> "FAILED   ";
            };
            if (test.isTest() || result.getStatus() != TestExecutionResult.Status.SUCCESSFUL) {
                System.out.println(outcome + name(test)
                        + result.getThrowable().map(problem -> ": " + problem.getMessage()).orElse(""));
            }
        }

        private String name(TestIdentifier test) {
            return plan.getParent(test).map(parent -> parent.getDisplayName() + " ").orElse("") + test.getDisplayName();
        }
    }
}
