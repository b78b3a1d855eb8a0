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

import java.io.*;
import java.util.*;
import java.util.concurrent.ConcurrentHashMap;
import java.util.logging.*;
import java.util.stream.Stream;
import org.junit.platform.engine.TestExecutionResult;
import org.junit.platform.engine.discovery.DiscoverySelectors;
import org.junit.platform.launcher.*;
import org.junit.platform.launcher.core.*;
import org.junit.platform.launcher.listeners.*;

/** Runs the test classes and sums up. Start it from the repository's root, as test/run does. */
class Tests {

    /** It warns of every symbolic link that it deletes with a temporary directory. */
    private static final Logger JUNIT_LOG = Logger.getLogger("org.junit");

    private static final String LONGEST = "LoopTest";

    /** Takes the names of the classes to run; none: all of them. */
    public static void main(String... names) {
        JUNIT_LOG.setLevel(Level.SEVERE);
        Hook.javaCommand(); // JBang compiles the script before the first test waits for a hook
        List<String> chosen = new ArrayList<>(names.length == 0 ? allClasses() : List.of(names));
        chosen.sort(Comparator.comparing(name -> !name.equals(LONGEST))); // first what takes a minute
        LauncherDiscoveryRequest request = LauncherDiscoveryRequestBuilder.request()
                .selectors(chosen.stream().map(DiscoverySelectors::selectClass).toList())
                .configurationParameters(Map.of("junit.jupiter.execution.parallel.enabled", "true",
                        "junit.jupiter.execution.parallel.mode.default", "concurrent",
                        "junit.jupiter.execution.parallel.config.executor-service", "WORKER_THREAD_POOL",
                        "junit.jupiter.execution.parallel.config.strategy", "fixed",
                        "junit.jupiter.execution.parallel.config.fixed.parallelism", "6",
                        "junit.jupiter.execution.timeout.default", "30 m")) // for what hangs, longer than any patience
                .build();
        SummaryGeneratingListener sum = new SummaryGeneratingListener();
        Progress progress = new Progress();
        LauncherFactory.create().execute(request, sum, progress);
        TestExecutionSummary summary = sum.getSummary();
        summary.printFailuresTo(new PrintWriter(System.out, true), 5);
        // What is aborted before it has tests, such as a class without its commands, counts as one.
        long skipped = summary.getTestsSkippedCount() + summary.getTestsAbortedCount()
                + summary.getContainersAbortedCount();
        long failed = summary.getTotalFailureCount();
        progress.printSlowest(5);
        System.out.printf("%d passed, %d failed, %d skipped%n", summary.getTestsSucceededCount(), failed, skipped);
        boolean skippingIsFailing = "true".equals(System.getenv("CI"));
        System.exit(failed > 0 || skippingIsFailing && skipped > 0 || summary.getTestsSucceededCount() == 0 ? 1 : 0);
    }

    private static List<String> allClasses() {
        return Stream.of(new File("test").list()).filter(name -> name.endsWith("Test.java"))
                .map(name -> name.replace(".java", "")).sorted().toList();
    }

    /** One line per test that ended, and how long it took. */
    private static final class Progress implements TestExecutionListener {
        private final long start = System.nanoTime();
        private final Map<String, Long> started = new ConcurrentHashMap<>();
        private final Map<String, Double> seconds = new ConcurrentHashMap<>();
        private TestPlan plan;

        void printSlowest(int most) {
            System.out.printf("Took %.0f s. These tests took longest:%n", since(start));
            seconds.entrySet().stream().sorted(Map.Entry.<String, Double>comparingByValue().reversed()).limit(most)
                    .forEach(test -> System.out.printf("%6.1f s  %s%n", test.getValue(), test.getKey()));
        }

        private static double since(long nanoTime) { return (System.nanoTime() - nanoTime) / 1e9; }

        @Override public void testPlanExecutionStarted(TestPlan plan) { this.plan = plan; }

        @Override public void executionStarted(TestIdentifier test) {
            started.put(test.getUniqueId(), System.nanoTime());
        }

        @Override public void executionSkipped(TestIdentifier test, String reason) {
            System.out.println("skipped  " + name(test) + ": " + reason);
        }

        @Override public void executionFinished(TestIdentifier test, TestExecutionResult result) {
            String outcome = switch (result.getStatus()) {
                case SUCCESSFUL -> "passed   ";
                case ABORTED -> "skipped  ";
                case FAILED -> "FAILED   ";
            };
            if (test.isTest() || result.getStatus() != TestExecutionResult.Status.SUCCESSFUL) {
                seconds.put(name(test), since(started.get(test.getUniqueId())));
                System.out.println(outcome + name(test)
                        + result.getThrowable().map(problem -> ": " + problem.getMessage()).orElse(""));
            }
        }

        private String name(TestIdentifier test) {
            return plan.getParent(test).map(parent -> parent.getDisplayName() + " ").orElse("") + test.getDisplayName();
        }
    }
}
