"""What one does on the demo's page, and what one sees there."""

from tests.browser.chromium import requested


class Page:
    """A page of tools/demo.py in a browser, just opened."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address
        requested(driver)
        driver.get_log("browser")
        driver.get(address)
        self.wait(lambda: self.find("go").is_enabled())

    def find(self, id):
        return self.driver.find_element("id", id)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: condition())

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        *held, last = [getattr(Keys, key, key) for key in keys]
        actions = ActionChains(self.driver)
        for key in held:
            actions.key_down(key)
        actions.send_keys(last)
        for key in held:
            actions.key_up(key)
        actions.perform()

    def set(self, name, value):
        self.run("part('option-' + arguments[0]).value = arguments[1]", name, value)

    def ask(self, text=None):
        """Presses Ctrl+Enter and waits for the end of the answer."""
        if text is not None:
            self.run("part('text').value = arguments[0]", text)
        self.find("text").click()
        self.press("CONTROL", "ENTER")
        self.wait(lambda: self.find("status").text.endswith(".") or self.find("error").text)

    @property
    def output(self):
        return self.run("return part('output').textContent")

    @property
    def candidates(self):
        return [
            (row.find_element("tag name", "code").text, row.text.split()[-1])
            for row in self.all("#detail li")
        ]

    def check_quiet(self, statuses=()):
        """Nothing was asked of another machine; the console has no errors but answers with these statuses."""
        addresses = requested(self.driver)
        assert addresses and all(a.startswith((self.address + "/", "data:,")) for a in addresses)
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        assert [m for m in said if not any(f"status of {status}" in m for status in statuses)] == []
